"""`mft env --measure`: time a masked layer on this machine with this torch, compared with dense and eager PyTorch.

Forward, d_x and d_scores are timed one by one, without autograd. The competitors are our ops from scores, our ops with
the mask held as bits, torch's dense product, and PyTorch's own ops on a masked weight (mft_kernels/eager.py). Our ops
are those that "auto" takes, or those of the backend that MFT_KERNELS asks for.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F

import mft_kernels
from mft.contention import Contention, core_share
from mft.tracking.progress import Progress
from mft_kernels.internal import (
    Inputs,
    Samples,
    asked_for,
    eager_grad_scores,
    eager_grad_x,
    eager_linear,
    median_ratio,
    random_inputs,
    time_within,
)

DENSE, SCORES, HELD, EAGER = "dense", "from scores", "held mask", "eager"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
TOKENS = (1, 64, 512)
OPS = ("forward", "d_x", "d_scores")
KEEP_RATIO = 0.9
SECONDS = 20.0  # for all measurements; the whole command then takes less than 30
SIZES = (4096, 2048, 1024, 512, 256)  # N = K: the largest that fits
CALLS = 5 * 4 * len(OPS)  # fewest calls with the most tokens: (rounds and warm-up) * competitors * ops
SLACK = 3.0  # a measured call may take this many times a dense product's time on average
LEVEL = 1.05  # ratios up to this, either way, count as level

Call = Callable[[], object]


@dataclass(frozen=True)
class Row:
    """One op in one dtype on M tokens: milliseconds of each competitor, round by round."""

    dtype: str
    op: str
    m: int
    samples: Samples

    def relative_time(self, name: str, other: str) -> float:
        """Return the time of ``name`` in units of ``other``."""
        return median_ratio(self.samples, name, other)


def run_measure(console: Console, *, seconds: float = SECONDS) -> list[Row]:
    """Print whether the machine is busy, measure, and print the table and whether eager is better anywhere.

    No verdict is given if the machine is busy at the start or at the end.
    """
    before = core_share(torch.get_num_threads())
    console.print(contention_line(before), soft_wrap=True)
    size = fitting_size(seconds)
    rows: list[Row] = []
    with Progress(console).phase("measuring", len(DTYPES) * len(TOKENS) * len(OPS)) as phase:
        for row in measured(size, seconds):
            rows.append(row)
            phase.advance()
    after = core_share(torch.get_num_threads())
    busy = before.is_busy or after.is_busy
    console.print(table_of(rows, size, busy=busy))
    if after.is_busy and not before.is_busy:
        console.print(contention_line(after), soft_wrap=True)
    console.print(conclusion(rows, busy=busy), soft_wrap=True)
    return rows


def contention_line(found: Contention) -> str:
    """Return a line that says what the share of the cores means for the times, and what to do about it."""
    if not found.is_busy:
        return f"the machine is quiet: {found}"
    fewer = f", or with OMP_NUM_THREADS={found.free_threads}" if found.cores >= 1 and found.threads > 1 else ""
    return (
        f"the machine is busy: {found}, and a product waits for its slowest thread. These times say little: measure "
        f"again on a quiet machine{fewer}"
    )


def fitting_size(seconds: float) -> int:
    """Return the largest size N = K with which all rows fit into seconds, judged by dense products at a small size."""
    small = SIZES[-2]
    took = 0.0
    for dtype in DTYPES.values():
        x, weight = torch.ones(max(TOKENS), small, dtype=dtype), torch.ones(small, small, dtype=dtype)
        took += min(time_within({DENSE: partial(F.linear, x, weight)}, 0, least=3)[DENSE]) * 1e-3
    for size in SIZES[:-1]:
        if SLACK * CALLS * took * (size / small) ** 2 <= seconds:
            return size
    return SIZES[-1]


def measured(size: int, seconds: float, tokens: tuple[int, ...] = TOKENS) -> Iterator[Row]:
    """Yield every row, at N = K = size. The seconds left are divided among the rows left."""
    begin, left = time.perf_counter(), len(DTYPES) * len(tokens) * len(OPS)
    for dtype in DTYPES:
        layer = random_inputs(max(tokens), size, size, DTYPES[dtype], DTYPES[dtype])
        for m in tokens:
            for op, calls in calls_of(layer, m).items():
                own = (seconds - (time.perf_counter() - begin)) / left
                yield Row(dtype, op, m, time_within(calls, max(0.0, own), least=3))
                left -= 1


def calls_of(layer: Inputs, m: int) -> dict[str, dict[str, Call]]:
    """Return the calls by op, then by competitor, on the first m tokens."""
    x, weight, scores, grad = layer.x[:m], layer.weight, layer.scores, layer.grad_output[:m]
    threshold = mft_kernels.kept_threshold(scores, KEEP_RATIO)
    packed = mft_kernels.pack_mask(scores, threshold)
    buffer = torch.zeros_like(weight)
    backward, backward_packed = torch.ops.mft.masked_linear_backward, torch.ops.mft.masked_linear_packed_backward

    def from_scores(*wanted: bool) -> object:
        return backward(grad, x, weight, scores, threshold, "magnitude", list(wanted), "auto")

    return {
        "forward": {
            DENSE: lambda: F.linear(x, weight),
            SCORES: lambda: mft_kernels.masked_linear(x, weight, scores, threshold),
            HELD: lambda: mft_kernels.masked_linear_packed(x, weight, packed),
            EAGER: lambda: eager_linear(x, weight, scores, threshold),
        },
        "d_x": {
            DENSE: lambda: grad @ weight,
            SCORES: lambda: from_scores(True, False, False, False),
            HELD: lambda: backward_packed(
                grad, x, weight, packed, None, None, "value", [True, False, False, False], "auto"
            ),
            EAGER: lambda: eager_grad_x(grad, weight, scores, threshold),
        },
        "d_scores": {
            DENSE: lambda: grad.T @ x,
            SCORES: lambda: from_scores(False, False, True, False),
            HELD: lambda: mft_kernels.accumulate_score_grad(buffer, grad, x, None),
            EAGER: lambda: eager_grad_scores(grad, x, weight, scores),
        },
    }


def verdict(ratio: float, *, busy: bool = False) -> str:
    """Return faster, level or SLOWER, or "?" if the times were taken on a busy machine."""
    if busy:
        return "?"
    return "faster" if ratio < 1 / LEVEL else "level" if ratio <= LEVEL else "SLOWER"


def table_of(rows: list[Row], size: int, *, busy: bool = False) -> Table:
    """Return a table with a line for each row, which compares our ops with dense."""
    asked = asked_for()
    backend = f"auto ({mft_kernels.backend_report()['auto']['cpu']})" if asked == "auto" else asked
    title = f"{backend} and eager, times dense; N = K = {size}, {torch.get_num_threads()} threads"
    table = Table(title=f"{title}; busy: no verdict" if busy else title)
    for name in ("", "M", "dense, ms", SCORES, HELD, EAGER):
        table.add_column(name, justify="right" if name else "left", no_wrap=not name)
    for row in rows:
        dense = sorted(row.samples[DENSE])[len(row.samples[DENSE]) // 2]
        ours = [row.relative_time(name, DENSE) for name in (SCORES, HELD)]
        shown = [f"{ratio:.2f} {verdict(ratio, busy=busy):6}" for ratio in ours]
        table.add_row(
            f"{row.op}, {row.dtype}", str(row.m), f"{dense:.3g}", *shown, f"{row.relative_time(EAGER, DENSE):.2f}"
        )
    return table


def conclusion(rows: list[Row], *, busy: bool = False) -> str:
    """Return a line that says whether eager PyTorch is better than the measured backend anywhere."""
    if busy:
        return "whether eager PyTorch is faster anywhere is left open: the machine was busy"
    taken = asked_for()
    worse = [
        f"{row.op}, {row.dtype}, M = {row.m}, {name} ({row.relative_time(name, EAGER):.2f} times eager)"
        for row in rows
        for name in (SCORES, HELD)
        if row.relative_time(name, EAGER) > LEVEL
    ]
    if not worse:
        what = "what auto takes" if taken == "auto" else taken
        return f"eager PyTorch is nowhere faster than {what} by more than {100 * (LEVEL - 1):.0f} %"
    return f"{taken} would be better off with eager PyTorch in {len(worse)} of {2 * len(rows)}: {'; '.join(worse)}"
