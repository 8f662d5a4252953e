"""A study small enough for a test: the tiny Llama on disk, rows of counting words, two or three settings per arm."""

import contextlib
import io

import pytest
import torch
from rich.console import Console
from tiny import counting_lines, save_llama

from mft_study.load import load_study
from mft_study.study_run import run_study

STUDY = """
model: {{name: {directory}/model, dtype: float32}}
mask: {{layers_to_transform: 2-3, init: magnitude, keep_ratio: 0.9}}
domains: {{count: {{source: {directory}/data.jsonl, sequence_length: 12, max_train_tokens: 288, max_eval_tokens: 96}}}}
full: {{batch_size: 4}}
stage: {{batch_size: 4}}
seeds: [0, 1]
extensions: 0
checkpoints: 2
workers: 1
output_dir: {directory}/run
arms:
"""
FULL = "  full: {kind: full, lrs: [1e-3, 1e-2]}\n"
FEW = FULL + "  control: {kind: control, lrs: [1e-2]}\n  MFT: {kind: mask, lrs: [1e-2, 3e-2]}\n"


@contextlib.contextmanager
def new_ground(tmp_path_factory):
    """Yield a directory with the model, the data and its own cache, until the block ends."""
    directory = tmp_path_factory.mktemp("ground")
    write_ground(directory)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MFT_CACHE", str(directory / "cache"))
        yield directory


def write_ground(directory):
    """Write the model and the data."""
    save_llama(directory / "model")
    (directory / "data.jsonl").write_text(counting_lines())


def make_study(directory, arms=FEW, overrides=()):
    path = directory / "study.yaml"
    path.write_text(STUDY.format(directory=directory) + arms)
    return load_study(path, list(overrides))


def run_quietly(study, directory, **options):
    """Run a study; return its findings, and the lines that told its progress."""
    said = io.StringIO()
    found = run_study(study, directory, console=Console(file=said, width=1000), **options)
    return found, [line for line in said.getvalue().splitlines() if line.startswith("[")]


def equal(a, b):
    """Return whether two values are the same to the last bit, tensors included."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    if hasattr(a, "__dict__") and not isinstance(a, type):
        return type(a) is type(b) and equal(vars(a), vars(b))
    return a == b
