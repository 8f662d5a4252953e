"""Measure how fast a batch generates if its rows use different masks: SmolLM2-135M, 8 rows, bf16 and fp32, tokens/s.

Every linear layer of the decoder is masked. A bank of masks with 1, 3 and 8 tasks, which the rows use in turn, is
compared with the dense model, one merged model and one held mask, which give every row the same task. Weights are
random, which does not change the times. Cache, sampling and attention are those of transformers.
"""

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mft.config import MaskConfig
from mft.masks.bank import load_mask_bank
from mft.masks.convert import mask_model, masked_modules, merge_model
from mft.masks.export import load_masks, save_masks
from mft.memory.shapes import known_config
from mft_kernels.timing import time_within

from .bench_generate import generate, rates
from .cpu_ceilings import DTYPES
from .harness import Finding, ratio, report
from .training_steps import build

DENSE, MERGED, HELD = "dense", "merged", "ours, one held mask"
TASKS = (1, 3, 8)


@dataclass(frozen=True)
class Budget:
    """Rows per batch, prompt and new tokens per row, and seconds per dtype beyond its minimum rounds."""

    rows: int = 8
    prompt: int = 32
    new: int = 32
    seconds: float = 20.0
    config: Mapping[str, Any] = field(default_factory=lambda: known_config("smollm2-135m"))


STORED = Budget()


def bank_name(tasks: int) -> str:
    """Return the name of a bank with this number of tasks."""
    return f"ours, {tasks} task{'s' if tasks > 1 else ''} in a batch"


def ways(masks: Path, budget: Budget, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """Return the timed functions of one dtype. Each task reads its own masks; equal values do not change the times."""

    def base() -> Any:
        return build(budget.config, dtype).eval().requires_grad_(False)

    held = load_masks(base(), masks, force=True)
    for module in masked_modules(held).values():
        module.hold(module.packed_mask())
    bank = load_mask_bank(base(), {f"task {i}": masks for i in range(max(TASKS))}, force=True)
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(3, 200, (budget.rows, budget.prompt), generator=generator)

    def by_bank(tasks: int) -> object:
        with bank.use([f"task {row % tasks}" for row in range(budget.rows)]):
            return generate(bank.model, prompt, budget.new)

    models = {DENSE: base(), MERGED: merge_model(load_masks(base(), masks, force=True)), HELD: held}
    found: dict[str, Callable[[], object]] = {
        name: lambda model=model: generate(model, prompt, budget.new) for name, model in models.items()
    }
    return found | {bank_name(tasks): lambda tasks=tasks: by_bank(tasks) for tasks in TASKS}


def main(quick: bool = False, budget: Budget = STORED) -> None:
    """Print and store the answer of this process."""
    findings: list[Finding] = []
    rows: list[dict] = []
    with tempfile.TemporaryDirectory() as folder:
        masks = save_masks(mask_model(build(budget.config), MaskConfig.paper()), Path(folder, "masks"))
        for dtype in DTYPES:
            samples = time_within(ways(masks, budget, DTYPES[dtype]), 0 if quick else budget.seconds, least=3)
            rates(dtype, samples, budget.rows * budget.new, findings, rows)
            findings += [ratio(samples, name, MERGED, suffix=f": {dtype}") for name in (DENSE, HELD)]
            findings += [ratio(samples, bank_name(tasks), MERGED, "at most", 1.1, f": {dtype}") for tasks in TASKS]
    tokens = f"{budget.rows} rows of {budget.prompt} + {budget.new} tokens"
    title = f"SmolLM2-135M's generate, masks by row, {tokens}, {torch.get_num_threads()} threads"
    report("decode", title, findings, competitors=rows)
