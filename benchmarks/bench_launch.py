"""Measure what a call costs the host: one forward pass of a layer so small that it has almost no other cost, in us.

The layer is 64 x 64, M = 1, one thread, fp32 and bf16. On a GPU, time_host of gpu/products.py measures the same for the
same kinds of layers. MaskedLinear remembers its mask from call to call. A held mask has a buffer for its gradient. The
op is the one that compiled graphs call. The goal limits how much longer than nn.Linear a forward pass may take, round
by round.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mft_kernels import MaskedLinear
from mft_kernels.timing import Samples, time_interleaved

from .cpu_ceilings import DTYPES
from .harness import Finding, Spread, report
from .rivals import KEEP_RATIO

SIDE = 64
DENSE_LAYER, LAYER, HELD_LAYER, OP = "nn.Linear", "MaskedLinear", "MaskedLinear, held", "mft.masked_linear_packed"
OURS = (LAYER, HELD_LAYER, OP)
NO_GRAD, INFERENCE, GRAD, STEP = "without grad", "under inference_mode", "with grad", "forward + backward"
MODES = {NO_GRAD: torch.no_grad, INFERENCE: torch.inference_mode, GRAD: torch.enable_grad, STEP: torch.enable_grad}
GOALS = {NO_GRAD: 20.0, INFERENCE: 20.0, GRAD: 35.0, STEP: None}  # us more than nn.Linear, at most

Layer = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Budget:
    """Rounds per situation in one process, and consecutive calls of each competitor in a round."""

    rounds: int = 21
    calls: int = 500


STORED, QUICK = Budget(), Budget(rounds=5, calls=100)


def layers(dtype: torch.dtype) -> dict[str, Layer]:
    """Return the competitors on one weight; ours share one mask. nn.Linear is frozen, so only x has a gradient."""
    linear = nn.Linear(SIDE, SIDE, bias=False, dtype=dtype).requires_grad_(False)
    masked, held = (MaskedLinear.from_linear(linear, keep_ratio=KEEP_RATIO) for _ in range(2))
    packed = masked.packed_mask()
    held.hold(packed, grad_buffer=torch.zeros(SIDE, SIDE, dtype=dtype))
    op = torch.ops.mft.masked_linear_packed
    return {
        DENSE_LAYER: linear,
        LAYER: masked,
        HELD_LAYER: held,
        OP: lambda x: op(x, linear.weight, packed, None, "auto"),
    }


def time_calls(competitors: dict[str, Layer], dtype: torch.dtype, situation: str, budget: Budget) -> Samples:
    """Measure milliseconds per call. In the modes with grad, x requires one. Gradients accumulate over calls."""
    x = torch.randn(1, SIDE, dtype=dtype, requires_grad=situation in (GRAD, STEP))
    grad = torch.ones(1, SIDE, dtype=dtype)

    def call(layer: Layer) -> Callable[[], object]:
        return (lambda: layer(x).backward(grad)) if situation == STEP else (lambda: layer(x))

    with MODES[situation]():  # around all calls: a caller pays itself for entering the mode
        calls = {name: call(layer) for name, layer in competitors.items()}
        return time_interleaved(calls, budget.rounds, budget.calls)


def rows_of(dtype: str, situation: str, samples: Samples) -> list[dict]:
    """Return one row per competitor: us, and us more than nn.Linear next to the goal."""
    rows = []
    for name, times in samples.items():
        above = Spread.of([1e3 * (a - b) for a, b in zip(times, samples[DENSE_LAYER])]) if name in OURS else None
        rows.append(
            {
                "dtype": dtype,
                "situation": situation,
                "competitor": name,
                "us": vars(Spread.of([1e3 * ms for ms in times])),
                "above": None if above is None else vars(above),
                "target": None if above is None else GOALS[situation],
                "rounds": len(times),
            }
        )
    return rows


def findings_of(row: dict, samples: Samples) -> list[Finding]:
    """Return the time. For ours also the difference with its goal, and the ratio that benchmarks.compare compares."""
    name, case = row["competitor"], f"{row['situation']}, {row['dtype']}"
    found = [Finding(f"{name}: {case}", Spread(**row["us"]), "us")]
    if name in OURS:
        rule = None if row["target"] is None else "at most"
        above = Finding(f"{name} - {DENSE_LAYER}: {case}", Spread(**row["above"]), "us", rule, row["target"])
        ratios = Spread.of([a / b for a, b in zip(samples[name], samples[DENSE_LAYER])])
        found += [above, Finding(f"ours, {name} / {DENSE_LAYER}: {case}", ratios)]
    return found


def main(quick: bool = False, budget: Budget = STORED) -> None:
    """Print and store the answer of this process."""
    findings, rows = [], []
    for name, dtype in DTYPES.items():
        competitors = layers(dtype)
        for situation in GOALS:
            samples = time_calls(competitors, dtype, situation, QUICK if quick else budget)
            own = rows_of(name, situation, samples)
            rows += own
            findings += [finding for row in own for finding in findings_of(row, samples)]
    report("launch", f"What a call of a layer of {SIDE} x {SIDE} costs, M = 1", findings, calls=rows)
