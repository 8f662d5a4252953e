"""Time whole optimiser steps of random models in each way of running, and compare them with mft estimate.

Time and memory do not depend on the values. Needs transformers, and no part of mft that reads data sets.
"""

import functools
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from ..harness import Spread
from ..records import ROOT
from .cases import Case
from .device import Device
from .results import FAILED, NOT_MEASURED
from .timing import FAILURES, Bench, reason

STEP, ESTIMATE = "a step", "mft estimate, of a card as in memory.md"
ACCUMULATION = 2
_ROUNDS, _CHECKED_STEPS = 5, 2
_QUANTIZATION = "int8"  # needs no package, unlike nf4
#: Largest difference of the first losses from those of plain by the reference: bf16 sums in another order, scores
#: rounded to 16 bits, and in quantized a coded base.
_MOST_APART = 0.02
#: Vocabulary of a single layer, so small that the head costs little.
_FEW_WORDS = 512
_TINY = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 1, "num_key_value_heads": 1,
         "num_hidden_layers": 1, "vocab_size": 64}  # fmt: skip


def time_train(case: Case, bench: Bench) -> dict[str, Any]:
    """Return times and peak bytes of a step of case.detail, "model, way", and the estimated bytes."""
    if str(ROOT / "python") not in sys.path:  # the recipe need not be installed
        sys.path.append(str(ROOT / "python"))
    device, (model, way) = bench.device, case.detail.rsplit(", ", 1)
    try:
        config = config_of(model, dry=device.dry)
        expected = _losses_by_the_reference(model, case.m, device)
        steps: list[Any] = []
        losses: list[float] = []

        def run() -> None:
            steps.append(_started(config, way, case.m, device))
            losses.extend(steps[0]() for _ in range(_CHECKED_STEPS))

        peak = device.peak(run)
        seconds = [_seconds(steps[0], device) for _ in range(1 if device.dry else _ROUNDS)]
        steps[0].close()
        estimate = _estimate(config, way, case.m, device)
    except ImportError as error:
        return {"status": NOT_MEASURED, "reason": f"without {error.name}: {error}"}
    except FAILURES as error:
        return {"status": FAILED, "reason": reason(error, device)}
    apart = max(abs(got / want - 1) for got, want in zip(losses, expected, strict=True))
    if not apart <= _MOST_APART:
        return {
            "status": FAILED,
            "reason": f"wrong: losses {losses}, those of plain by the reference are {expected}",
        }
    estimated = {"ms": asdict(Spread.of([1e3 * estimate.seconds])), "peak_bytes": estimate.device_peak}
    rounds = {"rounds_ms": [float(f"{1e3 * s:.5g}") for s in seconds]}
    measured = {"ms": asdict(Spread.of([1e3 * s for s in seconds])), "peak_bytes": peak} | rounds
    return {
        "tokens": ACCUMULATION * case.m,
        "losses": losses,
        "samples": {STEP: measured, ESTIMATE: estimated},
    }


def config_of(model: str, *, dry: bool = False) -> dict[str, Any]:
    """Return the configuration of one of cases.TRAINED; in a dry run a tiny one."""
    from mft.memory.shapes import known_config

    name = {"SmolLM2-135M": "smollm2-135m", "a SmolLM2 layer": "smollm2-135m", "a LLaMA2-7B layer": "llama2-7b"}[model]
    alone = {"num_hidden_layers": 1, "vocab_size": _FEW_WORDS} if model.startswith("a ") else {}
    return known_config(name) | (_TINY if dry else alone)


def _seconds(step: Callable[[], object], device: Device) -> float:
    device.synchronize()
    start = time.perf_counter()
    step()
    device.synchronize()
    return time.perf_counter() - start


def _started(config: Mapping[str, Any], way: str, tokens: int, device: Device) -> Any:
    from ..training_steps import TrainingStep, build

    model = build(config)
    return TrainingStep(
        f"ours, {way}", model, tokens, ACCUMULATION, device=device.torch_device, quantization=_QUANTIZATION
    )


@functools.cache
def _losses_by_the_reference(model: str, tokens: int, device: Device) -> list[float]:
    os.environ["MFT_KERNELS"] = "reference"
    try:
        steps = _started(config_of(model, dry=device.dry), "plain", tokens, device)
        losses = [steps() for _ in range(_CHECKED_STEPS)]
        steps.close()
    finally:
        del os.environ["MFT_KERNELS"]
    assert all(map(math.isfinite, losses)), f"the reference itself must stay finite, got {losses}"
    return losses


def _estimate(config: Mapping[str, Any], way: str, tokens: int, device: Device) -> Any:
    from mft.memory.estimate import estimate
    from mft.memory.shapes import shape_from_config

    from ..training_steps import workload_of

    workload = workload_of(way, tokens, ACCUMULATION, device.torch_device.type, _QUANTIZATION)
    return estimate(shape_from_config(config, "random weights"), workload)
