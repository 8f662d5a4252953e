"""What does a call cost the host? One forward of a layer so small that next to nothing else is timed, in microseconds.

64 x 64, M = 1, one thread, fp32 and bf16, in the words of gpu/host.py, which asks this of a GPU. MaskedLinear remembers
its mask from call to call; a held one has a buffer for its gradient; the op is one that compiled graphs call. What is
asked is how much a forward may take above nn.Linear's own, round by round.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from mft_kernels import MaskedLinear
from mft_kernels.timing import Samples, time_interleaved

from .cpu_ceilings import DTYPES
from .harness import Finding, Spread, report
from .rivals import KEEP_RATIO
from .tables import launch_tables

SIDE = 64
DENSE_LAYER, LAYER, HELD_LAYER, OP = "nn.Linear", "MaskedLinear", "MaskedLinear, held", "mft.masked_linear_packed"
OURS = (LAYER, HELD_LAYER, OP)
NO_GRAD, INFERENCE, GRAD, STEP = "without grad", "under inference_mode", "with grad", "forward + backward"
MODES = {NO_GRAD: torch.no_grad, INFERENCE: torch.inference_mode, GRAD: torch.enable_grad, STEP: torch.enable_grad}
GOALS = {NO_GRAD: 20.0, INFERENCE: 20.0, GRAD: 35.0, STEP: None}  # us above nn.Linear's own, at most

Layer = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Budget:
    """Rounds of each situation in one process, and calls in a row of each competitor in a round."""

    rounds: int = 21
    calls: int = 500


STORED, QUICK = Budget(), Budget(rounds=5, calls=100)


def layers(dtype: torch.dtype) -> dict[str, Layer]:
    """The competitors, on one weight; ours by one mask. nn.Linear is frozen: its gradient is x's alone."""
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
    """Milliseconds a call; with grad x asks for one, as what learns in the layer does. Gradients add up over calls."""
    x = torch.randn(1, SIDE, dtype=dtype, requires_grad=situation in (GRAD, STEP))
    grad = torch.ones(1, SIDE, dtype=dtype)

    def call(layer: Layer) -> Callable[[], object]:
        return (lambda: layer(x).backward(grad)) if situation == STEP else (lambda: layer(x))

    with MODES[situation]():  # around all calls: to enter it is a caller's own cost
        calls = {name: call(layer) for name, layer in competitors.items()}
        return time_interleaved(calls, budget.rounds, budget.calls)


def rows_of(dtype: str, situation: str, samples: Samples) -> list[dict]:
    """A row a competitor: us, and us above nn.Linear's beside what is asked."""
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
    """The time; of ours the difference, by what is asked, and the ratio, which benchmarks.compare compares."""
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
    report("launch", f"What a call of a layer of {SIDE} x {SIDE} costs, M = 1", findings, printed=False, calls=rows)
    print("\n\n".join(launch_tables({"calls": rows})))


def conclude(path: Path) -> None:
    """Print the tables of the record that has been written."""
    print("\n" + "\n\n".join(launch_tables(json.loads(path.read_text()))))
