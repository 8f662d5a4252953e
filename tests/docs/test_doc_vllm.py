"""docs/how-to/vllm.md without vLLM: its Python compiles and its options exist. masks_in_vllm tests the real one."""

import shlex
from pathlib import Path

from dead_links import BLOCK

from mft.vllm.serve import read_arguments

DOC = Path(__file__).parents[2] / "docs" / "how-to" / "vllm.md"


def test_the_blocks_are_python_and_commands_that_mft_vllm_takes():
    servers = []
    for language, text in BLOCK.findall(DOC.read_text()):
        assert language in ("python", "sh", "text")
        if language == "python":
            compile(text, DOC.name, "exec")
        elif language == "sh":
            for line in text.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                servers += [words[words.index("mft.vllm") + 1 :]] if "mft.vllm" in words else []
    [words] = servers
    ours, rest = read_arguments(words)
    assert ours.masks == ["python=runs/python", "problems=runs/problems"]
    assert rest[0] == "base"
