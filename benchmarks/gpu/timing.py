"""Time one product of one shape: each competitor checked against the eager form, then timed in interleaved rounds.

The clock of a GPU follows its temperature and power, so every round replays each competitor once, in a new order, and
ratios are taken within a round.
"""

import functools
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from torch import Tensor
from triton.runtime.errors import TritonError

from ..harness import Spread
from .cases import DENSE, EAGER, Case, competitors, floor_ms, left_out, work
from .competitors import (
    KEEP_BYTES,
    NOT_CAPTURED,
    SCORE_BYTES,
    Inputs,
    Operands,
    Run,
    difference,
    functions,
    outputs,
    tolerance,
)
from .device import Device, Timer, first_line

ROUNDS = 11
#: Where a call takes longer than this, three rounds do.
_LONG_MS = 50.0
_FEW_ROUNDS = 3

#: What a competitor may raise while the others are still measured: torch's own, Triton's, and a changed interface.
FAILURES = (RuntimeError, TritonError, TypeError, AttributeError, ValueError, NotImplementedError)


def time_product(case: Case, inputs: Inputs, device: Device, ceilings: Mapping[str, float]) -> dict[str, Any]:
    """samples, failures and what was left out, of one of cases.PRODUCTS."""
    device.tidy()
    operands = inputs.get(case.n, case.k, case.m, sums=case.what == "accumulate")
    runs = functions(case.what, competitors(case), device)
    failures = _wrong(case, runs, operands[0], device)
    runs = {name: run for name, run in runs.items() if name not in failures}
    calls = {name: functools.partial(_on_copy, run, operands) for name, run in runs.items()}
    samples, failed = time_calls(calls, len(operands), device, not_captured=NOT_CAPTURED)
    for name, sample in samples.items():
        phases = work(case.what, case.n, case.k, case.m, KEEP_BYTES.get(name, SCORE_BYTES))
        add_floors(sample, phases, ceilings)
        if DENSE in samples:
            shares = [100 * d / t for d, t in zip(samples[DENSE]["rounds_ms"], sample["rounds_ms"])]
            sample["percent_of_cublas"] = asdict(Spread.of(shares))
    return {
        "copies": len(operands),
        "samples": samples,
        "failures": {**failures, **failed},
        "left_out": without(case, device),
    }


def time_calls(
    calls: Mapping[str, Callable[[int], object]],
    copies: int,
    device: Device,
    *,
    not_captured: frozenset[str],
    by_the_clock: frozenset[str] = frozenset(),
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """(samples, why others have none): name -> call of a copy's index; ``by_the_clock``: with what the host needs."""
    timers: dict[str, Timer] = {}
    failures: dict[str, str] = {}
    # A capture empties the allocator's cache: those that allocate while they are timed come after all captures.
    for name, call in sorted(calls.items(), key=lambda item: item[0] in not_captured):
        try:
            if name in by_the_clock:
                timers[name] = device.clock(call, copies)
            else:
                timers[name] = device.timer(call, copies, capture=name not in not_captured)
        except FAILURES as error:
            failures[name] = reason(error, device)
    rounds = in_rounds(timers, 2 if device.dry else ROUNDS)
    samples = {
        name: {
            "method": timer.method,
            **({"note": timer.note} if timer.note else {}),
            "calls": timer.calls,
            "ms": asdict(Spread.of(rounds[name])),
            "rounds_ms": [float(f"{ms:.5g}") for ms in rounds[name]],
        }
        for name in calls
        if (timer := timers.get(name))
    }
    return samples, failures


def in_rounds(timers: Mapping[str, Timer], rounds: int, seed: int = 0) -> dict[str, list[float]]:
    """Milliseconds a call, one sample a round; the slowest take part in the first rounds alone."""
    order = random.Random(seed)
    samples: dict[str, list[float]] = {name: [] for name in timers}
    for r in range(rounds):
        for name in order.sample(list(timers), len(timers)):
            if r < _FEW_ROUNDS or timers[name].estimate <= _LONG_MS:
                samples[name].append(timers[name].replay())
    return samples


def add_floors(sample: dict[str, Any], phases: list[tuple[float, float]], ceilings: Mapping[str, float]) -> None:
    """Set floor_ms and the percentages of it that a sample reaches."""
    by_bytes, by_flops, floor = floor_ms(phases, ceilings["bytes_per_second"], ceilings["flops_per_second"])
    median = sample["ms"]["median"]
    sample["floor_ms"] = floor
    sample["percent_of_byte_floor"] = 100 * by_bytes / median
    sample["percent_of_flop_floor"] = 100 * by_flops / median


def measure_memory(case: Case, inputs: Inputs, device: Device) -> dict[str, Any]:
    """Peak memory of a step of each competitor, and its results: y, d_x and the gradient of the weight's size."""
    operands = inputs.get(case.n, case.k, case.m)[0]
    weight = operands.weight.nbytes
    samples: dict[str, dict[str, Any]] = {}
    failures: dict[str, str] = {}
    for name, run in functions("step", competitors(case), device).items():
        device.tidy()
        try:
            peak, results = device.peak(functools.partial(_outputs, run, operands))
        except FAILURES as error:
            failures[name] = reason(error, device)
            continue
        beyond = peak - results
        samples[name] = {"peak_bytes": peak, "result_bytes": results, "beyond_results_of_weight": beyond / weight}
    return {"weight_bytes": weight, "samples": samples, "failures": failures, "left_out": without(case, device)}


def without(case: Case, device: Device) -> dict[str, str]:
    """Who is not measured, and why: by plan, or because the device is without it."""
    return left_out(case) | {name: why for name, why in device.without.items() if name in competitors(case)}


def _wrong(case: Case, runs: Mapping[str, Any], operands: Operands, device: Device) -> dict[str, str]:
    """Why a competitor is not timed: it fails, or computes something else than the eager form."""

    def results(run: Run) -> Tensor | tuple[Tensor, ...]:
        if operands.sums is None:
            return run(operands)
        operands.sums.zero_()
        return outputs(run(operands))[0].clone()

    expected = results(functions(case.what, [EAGER], device)[EAGER])
    reasons = {}
    for name, run in runs.items():
        most = tolerance(name)
        if most is None:
            continue
        try:
            apart = difference(results(run), expected)
        except FAILURES as error:
            reasons[name] = reason(error, device)
            continue
        if apart > most:
            reasons[name] = f"wrong: {apart:.3g} from the eager form, at most {most:g}"
    return reasons


def reason(error: BaseException, device: Device) -> str:
    """In a line; raises instead where the device is lost, since nothing else would run either."""
    device.synchronize()
    return f"{type(error).__name__}: {first_line(error)}"


def _on_copy(run: Callable[[Operands], object], operands: Sequence[Operands], copy: int) -> object:
    return run(operands[copy])


def _outputs(run: Run, operands: Operands) -> Sequence[Tensor]:
    return outputs(run(operands))
