"""Replacements of the model hub, the data sets and the GPU in a small run of PEFT's method comparison."""

import contextlib
import importlib
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import torch

from mft.data.corpora import stdlib_files
from mft.data.problems import Problem, make_problems
from mft.models.pretrained import smollm2_directory

TEST, VALID = 100, 50  # questions
TEXTS, LONGEST = 6, 1200  # Python files that measure forgetting, and the most characters of each
MODEL = "smollm2-135m"  # in training_params.json

# (file, old text, new text): checks that the copy of PEFT's scripts must relax.
ANY_DEVICE = "utils.py", 'not in ["cuda", "xpu"]', 'not in ["cuda", "xpu", "cpu"]'
ANY_LOSS = "run.py", "1 < wiki_loss_before < 2", "1 < wiki_loss_before < 4"  # a small model's loss is above 2


def install(suite: Path) -> None:
    """Make the suite's modules, which are imported here, use local data, a local model and this machine's device."""
    _change(suite, *ANY_LOSS)
    if not torch.cuda.is_available():
        _change(suite, *ANY_DEVICE)
        _stand_in_for_memory()
    data, utils = importlib.import_module("data"), importlib.import_module("utils")
    data.load_dataset = _load_dataset
    utils.get_peft_branch = lambda: "small"  # the result is then filed as a test, without asking git
    utils.get_peft_worktree_is_dirty = lambda: False
    if sys.version_info < (3, 12):  # TemporaryDirectory has no option "delete" there
        utils.tempfile = SimpleNamespace(
            TemporaryDirectory=lambda delete, **options: tempfile.TemporaryDirectory(**options)
        )
    directory = str(smollm2_directory("bfloat16"))
    for name in ("AutoModelForCausalLM", "AutoTokenizer"):
        setattr(utils, name, _Local(getattr(utils, name), directory))


@contextlib.contextmanager
def inside(folder: Path) -> Iterator[None]:
    """Run inside ``folder``: the suite's paths are relative to it."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


class _Local:
    """A class of transformers whose from_pretrained reads MODEL from a directory."""

    def __init__(self, loader: Any, directory: str) -> None:
        self._loader, self._directory = loader, directory

    def from_pretrained(self, name: str | None = None, **options: Any) -> Any:
        name = options.pop("pretrained_model_name_or_path", name)
        return self._loader.from_pretrained(self._directory if name == MODEL else name, **options)


def _load_dataset(name: str, *_: Any, **__: Any) -> Any:
    """Return the replacement of a data set that PEFT's data.py loads by its name on the hub."""
    if name == "HuggingFaceFW/finewiki":
        texts = [text[:LONGEST] for text in stdlib_files().values() if len(text) >= LONGEST][:TEXTS]
        return SimpleNamespace(take=lambda number: [{"text": text} for text in texts[:number]])
    problems = make_problems()
    if name == "meta-math/MetaMathQA":
        rows = [_training_row(problem) for problem in _mixed(problems["train"])]
        return {"train": datasets.Dataset.from_list(rows)}
    if name == "openai/gsm8k":
        train = [_question(problem) for problem in _mixed(problems["validation"])[:VALID]]
        test = [_question(problem) for problem in _mixed(problems["test"])[:TEST]]
        return datasets.DatasetDict(train=datasets.Dataset.from_list(train), test=datasets.Dataset.from_list(test))
    raise ValueError(f"{name} must have a replacement in {__name__}: PEFT's data.py has changed")


def _mixed(problems: list[Problem]) -> list[Problem]:
    """Return problems whose answers are plain numbers, as PEFT's script compares them, with kinds alternating."""
    exact = [problem for problem in problems if problem.answer.lstrip("-").isdigit()]
    return sorted(exact, key=lambda problem: (hash(problem.numbers), problem.kind))


def _training_row(problem: Problem) -> dict[str, str]:
    response = f"The answer is: {problem.answer}"
    return {"type": "problem", "query": problem.question, "original_question": problem.question, "response": response}


def _question(problem: Problem) -> dict[str, str]:
    return {"question": problem.question, "answer": f"#### {problem.answer}"}


def _temporary_directory(*, delete: bool, **options: Any) -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(**options)


def _change(suite: Path, name: str, old: str, new: str) -> None:
    path = suite / name
    text = path.read_text(encoding="utf-8")
    if old not in text:
        raise RuntimeError(f"{path} must hold {old!r}, which a small run changes: PEFT's script has changed")
    path.write_text(text.replace(old, new), encoding="utf-8")


def _stand_in_for_memory() -> None:
    """Report 0 for a GPU's memory on a CPU, because PEFT's script asks for it."""
    for name in ("memory_allocated", "memory_reserved", "max_memory_reserved"):
        setattr(torch.cpu, name, lambda *_: 0)
    for name in ("empty_cache", "reset_peak_memory_stats", "manual_seed_all"):
        setattr(torch.cpu, name, lambda *_: None)
    torch.cpu.get_device_name = lambda *_: "cpu"  # type: ignore[attr-defined]
