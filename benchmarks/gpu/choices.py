"""What the model of the card would choose in a timed case, what was fastest, and the regret.

A goal is the model's own time relative to cuBLAS on the unmasked weight; "met" is at most 5 % above it.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mft_kernels.backends.triton.choice import SCRATCH, Product, by_model
from mft_kernels.backends.triton.cost import LAUNCH
from mft_kernels.backends.triton.plan import (
    Operands,
    Problem,
    dense_seconds,
    fused_seconds,
    outer_seconds,
    outer_tiles,
    scratch_seconds,
)
from mft_kernels.backends.triton.target import Target, target_of

from .cases import DENSE, FUSED, PASS, PLACE, Case
from .timing import Bench

WAYS = (FUSED, PLACE, DENSE, PASS)
_MORE = 1.05
#: Bytes per weight of the optimiser's step with int16 scores and 8-bit moments: gradient, weight, scores, moments.
_UPDATE_BYTES = 4 + 2 + 2 * (2 + 2)
#: The same of a change of the mask in place: seven passes over its bits, in as many launches.
_CHANGE_BYTES, _CHANGE_LAUNCHES = 7 / 8, 7


def judged(case: Case, fields: dict[str, Any], bench: Bench) -> dict[str, Any]:
    """Add to the fields of a timed case what the model says of it, if it was timed in all ways."""
    times = {name: sample["ms"]["median"] for name, sample in fields["samples"].items() if name in WAYS}
    if times.keys() != set(WAYS):
        return fields
    published = target_of(bench.device.torch_device)
    target = replace(published, l2_rate=bench.ceilings.get("l2_rate", 0))
    expected = {name: 1e3 * value for name, value in _expected(case, target).items()}
    goals = {
        name: {"goal": expected[name] / expected[DENSE], "ratio": times[name] / times[DENSE]}
        for name in WAYS
        if name != DENSE
    }
    for goal in goals.values():
        goal["met"] = goal["ratio"] <= _MORE * goal["goal"]
    choice = {
        "ran": _automatic(case, published),
        "an op": _decided((FUSED, PASS), times, expected),
        "training": _decided((FUSED, PLACE, PASS), times, expected),
    }
    return fields | {"expected_ms": expected, "goals": goals, "choice": choice}


def _decided(ways: tuple[str, ...], times: Mapping[str, float], expected: Mapping[str, float]) -> dict[str, Any]:
    """Return the model's way, the fastest, and the share of time that the model's takes beyond it."""
    chosen, fastest = min(ways, key=expected.__getitem__), min(ways, key=times.__getitem__)
    return {"model": chosen, "fastest": fastest, "regret": times[chosen] / times[fastest] - 1}


def _automatic(case: Case, target: Target) -> str:
    """Return what backend="auto" takes for an op, with the rates of cards.py."""
    product = Product(case.m, case.n, case.k, case.what == "d_x", "torch.bfloat16", "torch.bfloat16")
    return PASS if by_model(product, target) == SCRATCH else FUSED


def _expected(case: Case, target: Target) -> dict[str, float]:
    """Return the seconds that the model expects of each way."""
    forward = Problem(target, case.m, case.n, case.k, Operands(2, 2))
    seconds = {FUSED: fused_seconds, PLACE: dense_seconds, DENSE: dense_seconds, PASS: scratch_seconds}
    if case.what != "update":
        problem = forward.flipped if case.what == "d_x" else forward
        return {name: of(problem) for name, of in seconds.items()}
    outer = forward._replace(operands=Operands(2))
    byte_seconds = case.n * case.k / (target.bandwidth or 3e12)
    same = outer_seconds(outer, outer_tiles(outer)) + _UPDATE_BYTES * byte_seconds
    change = {PLACE: _CHANGE_LAUNCHES * LAUNCH + _CHANGE_BYTES * byte_seconds}
    return {name: of(forward) + of(forward.flipped) + same + change.get(name, 0) for name, of in seconds.items()}
