"""Measure how the cost of a training step grows with tokens, width, masked layers, micro-batches and threads.

The models are small LLaMAs (training_steps.small_config), with one setting changed at a time. The full fine-tune of
the same model is measured together with them, round by round.
"""

from dataclasses import dataclass, replace

import torch

from mft_kernels.timing import time_within

from .harness import Finding, Spread, ratio, report
from .training_steps import FULL, TrainingStep, build, small_config

COMPETITORS = (FULL, "ours, plain", "ours, resident", "ours, layerwise")


@dataclass(frozen=True)
class Point:
    """One model and step; the last ``masked`` layers have masks (all if None)."""

    tokens: int = 256
    width: int = 1024
    layers: int = 2
    masked: int | None = None
    accumulation: int = 1
    threads: int | None = None  # None: as many as all questions use

    @property
    def masked_layers(self) -> list[int] | None:
        return None if self.masked is None else list(range(self.layers - self.masked, self.layers))


BASE = Point()
EIGHT_LAYERS = Point(width=512, layers=8)
SMALL_BATCHES = Point(tokens=128)
# axis: (what varies, the base point, its values)
AXES = {
    "tokens": ("tokens", BASE, (64, 256, 1024, 2048)),
    "width": ("width", BASE, (256, 512, 1024, 2048)),
    "masked layers of 8": ("masked", EIGHT_LAYERS, (1, 2, 4, 8)),
    "micro-batches a step": ("accumulation", SMALL_BATCHES, (1, 2, 4, 8)),
    "threads": ("threads", BASE, (1, 2)),
}


def measure(axis: str, value: int, point: Point, seconds: float, least: int) -> tuple[list[Finding], list[dict]]:
    """Return the findings and one row per competitor at one point."""
    threads = torch.get_num_threads()
    torch.set_num_threads(point.threads or threads)
    steps = {}
    for name in COMPETITORS:
        model = build(small_config(point.width, point.layers))
        layers = None if name == FULL else point.masked_layers
        steps[name] = TrainingStep(name, model, point.tokens, point.accumulation, layers)
    samples = time_within(steps, seconds, least=least)
    for step in steps.values():
        step.close()
    torch.set_num_threads(threads)
    suffix = f": {axis} = {value}"
    findings = [ratio(samples, name, FULL, suffix=suffix) for name in COMPETITORS if name != FULL]
    rows = [{"axis": axis, "value": value, "competitor": n, "ms": vars(Spread.of(v))} for n, v in samples.items()]
    return findings, rows


def main(quick: bool = False) -> None:
    """Print and store the answer."""
    seconds, least = (0.1, 2) if quick else (0.7, 2)  # in one of the processes (pooled.py)
    findings, rows = [], []
    for axis, (name, start, values) in AXES.items():
        for value in values[:2] if quick else values:
            print(f"{axis} = {value}", flush=True)
            found, measured = measure(axis, value, replace(start, **{name: value}), seconds, least)
            findings += found
            rows += measured
    report("scaling", "A training step of small LLaMAs in bf16, one setting at a time", findings, points=rows)
