"""Check and time every legal configuration of one product, and judge what plan.py takes and what its model says."""

import functools
import random
import statistics
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from torch import Tensor

from mft_kernels.backends.triton.plan import Operands, Tiles
from mft_kernels.backends.triton.target import H100_OLD_TRITON, Target, target_of
from mft_kernels.eager import eager_grad_scores, eager_grad_x, eager_linear

from ..cases import FUSED, Case
from ..competitors import Inputs, difference, tolerance
from ..competitors import Operands as Tensors
from ..device import Device
from ..journal import FAILED, MEASURED
from ..timing import FAILURES, reason
from .ahead import compile_all, run
from .configurations import Problem, instead, legal, planned, predicted

#: Of one product, so that the five of a shape are done within 90; of that, what compiling may take.
SECONDS = 18.0
_COMPILING = 0.65
_ROUNDS = 3
_MOST_APART = tolerance(FUSED) or 0.0
#: In a dry run, which compiles for a card that is not there.
_DRY_COMPILED = 1


def time_sweep(case: Case, inputs: Inputs, device: Device, seconds: float) -> tuple[str, dict[str, Any]]:
    """(status, every configuration with its time, and the judgement); case.detail is the kind of product."""
    device.tidy()
    problem = Problem(case.detail, case.m, case.n, case.k)
    target, given = target_of(device.torch_device), _operands(problem)
    own = planned(problem, target, given)
    others = [tiles for tiles in legal(problem, target, given) if tiles != own]
    random.Random(0).shuffle(others)  # so that what time does not suffice for is missing everywhere alike
    every = [own, *others]
    start = time.time()
    seconds = min(seconds, SECONDS)
    if device.dry:
        elsewhere = legal(problem, H100_OLD_TRITON, given)[:_DRY_COMPILED]
        compiled = compile_all(problem, H100_OLD_TRITON, elsewhere, start + 120.0)
        wrong = [f"{tiles}: {why}" for tiles, why in compiled.items() if why] or None
        assert len(compiled) == len(elsewhere), f"compiled {len(compiled)} of {len(elsewhere)}: {wrong}"
        compiled = dict.fromkeys(every[:3])
    else:
        compiled = compile_all(problem, target, every, start + _COMPILING * seconds)
    operands = inputs.get(case.n, case.k, case.m)
    expected = _expected(problem, operands[0])
    timed: list[dict[str, Any]] = []
    refused = Counter(why.split(":")[0] for why in compiled.values() if why)
    failures: dict[str, str] = {}
    for tiles in (tiles for tiles, why in compiled.items() if why is None):
        if not device.dry and time.time() - start > seconds:
            break
        try:
            ms, apart = _time(problem, tiles, operands, expected, device)
        except FAILURES as error:
            refused[reason(error, device).split(":")[0]] += 1
            continue
        if apart > _MOST_APART:
            failures[str(tiles)] = f"wrong: {apart:.3g} from the eager form"
            continue
        timed.append({"tiles": asdict(tiles), "ms": float(f"{ms:.5g}")})
    fields = {
        "target": asdict(target),
        "legal": len(every),
        "compiled": sum(why is None for why in compiled.values()),
        "refused": dict(refused),
        "configurations": sorted(timed, key=lambda found: found["ms"]),
        "failures": failures,
        "left_out": {},
    }
    judged = judge({"detail": case.detail, "n": case.n, "k": case.k, "m": case.m} | fields)
    return (FAILED if failures else MEASURED), fields | {"judged": judged}


def judge(record: Mapping[str, Any]) -> dict[str, Any]:
    """What the plan of now takes among the configurations of a record, how much slower than the best that is, and how
    far its model is from the times.

    Returns: choice, best: tiles; regret: share of the best's time, None if the choice was not timed; error: the median
        of |model / measured - 1|, None where nothing was timed.
    """
    problem = Problem(record["detail"], record["m"], record["n"], record["k"])
    stored = record["target"]  # JSON has no tuples
    target = Target(**stored | {"compiler": tuple(stored.get("compiler", (0, 0)))})
    given = _operands(problem)
    own = planned(problem, target, given)
    times = {Tiles(**found["tiles"]): found["ms"] for found in record["configurations"]}
    errors = [abs(1e3 * predicted(problem, target, given, tiles) / ms - 1) for tiles, ms in times.items()]
    best = min(times, key=times.__getitem__) if times else None
    return {
        "choice": asdict(own),
        "best": None if best is None else asdict(best),
        "regret": None if best is None or own not in times else times[own] / times[best] - 1,
        "error": statistics.median(errors) if errors else None,
    }


def _operands(problem: Problem) -> Operands:
    """bf16, whole rows of 16 bytes; d_scores reads no mask."""
    return Operands(element=2, keep=0 if problem.kind == "d_scores" else 2)


def _expected(problem: Problem, o: Tensors) -> tuple[Tensor, ...]:
    if problem.kind == "forward":
        return (eager_linear(o.x, o.weight, o.scores, o.threshold),)
    d_x = functools.partial(eager_grad_x, o.grad, o.weight, o.scores, o.threshold)
    d_scores = functools.partial(eager_grad_scores, o.grad, o.x, o.weight, o.scores)
    return tuple(make() for make in {"d_x": [d_x], "d_scores": [d_scores], "backward": [d_x, d_scores]}[problem.kind])


def _time(
    problem: Problem, tiles: Tiles, operands: list[Tensors], expected: tuple[Tensor, ...], device: Device
) -> tuple[float, float]:
    """(milliseconds, relative difference from the eager form)."""

    def call(copy: int) -> tuple[Tensor, ...]:
        o = operands[copy]
        return tuple(run(problem, o.x, o.grad, o.weight, o.scores, o.threshold))

    with instead(problem, tiles):
        apart = difference(call(0), expected)
        timer = device.timer(call, len(operands), capture=False)
        return statistics.median(timer.replay() for _ in range(1 if device.dry else _ROUNDS)), apart
