"""Measure if the mask is free on this processor: a layer's step and few tokens compared with dense and eager PyTorch.

Dtypes are bf16 and fp32. It takes minutes, while `ops` takes most of an hour, because it measures only the cases of
cpu_targets.py and their neighbours. Shares are relative to the machine's own ceilings, measured in the run: torch's
best GEMM of the dtype at 4096 x 4096 x 4096, and reading and copying as many bytes as the 4096 x 4096 weight has.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby

import torch

from mft_kernels.timing import Samples, time_interleaved, time_within

from . import layer_competitors as layers
from .cpu_ceilings import DTYPES, CpuCeilings
from .cpu_targets import EAGER_BOUND, NARROW, SQUARE, bound
from .harness import Finding, Spread, comparison_row, instruction_set, ratio, report, select_cases
from .layer_competitors import DENSE, EAGER, FROM_SCORES, HELD, IN_PLACE, LayerCompetitors, inputs_of
from .roofline import count_work
from .side_by_side import SideBySide

COMPETITORS = (DENSE, IN_PLACE, FROM_SCORES, HELD, EAGER)
Cases = tuple[tuple[tuple[int, int], tuple[tuple[str, int], ...]], ...]  # (N, K), (op, M)
# Most tokens last: the 4096 x 4096 matrices and their gradients are then already in their final place in memory.
MANY_THREADS: Cases = (
    (
        SQUARE,
        (
            *(("forward", 1), ("d_x", 1), ("forward", 16), ("d_x", 16)),
            *(("step", 64), ("step", 512), ("step", 4096)),
        ),
    ),
    (NARROW, (("step", 512),)),
)
ONE_THREAD: Cases = ((SQUARE, (("forward", 1), ("d_x", 1), ("step", 512))),)


@dataclass(frozen=True)
class Budget:
    """The cases, and how long a case may take beyond its minimum rounds, in one process."""

    many: Cases = MANY_THREADS
    one: Cases = ONE_THREAD
    seconds: float = 0.5
    ceilings: int = 4096  # rows of the ceilings' matrices


STORED = Budget()
SLOW = 8e9  # M N K per thread from which three rounds per process suffice: the first round touches new memory


@dataclass(frozen=True)
class Case:
    """An op on a shape, in a dtype, with a number of threads."""

    op: str
    dtype: str
    n: int
    k: int
    m: int
    threads: int

    def __str__(self) -> str:
        thread = ", 1 thread" if self.threads == 1 else ""
        return f"{self.op}, {self.dtype}, {self.n} x {self.k}, M = {self.m}{thread}"


class Measured:
    """Findings and rows of all cases. Each is printed when it is measured."""

    def __init__(self) -> None:
        self.findings: list[Finding] = []
        self._timed: list[tuple[Case, Samples]] = []
        self.backends = SideBySide.here()

    def add(self, case: Case, samples: Samples) -> None:
        """Add ratios to dense and eager with their bounds, of other backends to ours, and of eager to dense."""
        self._timed.append((case, samples))
        print(f"{case}: {Spread.of(samples[DENSE])} ms {DENSE}", flush=True)
        for name in (name for name in samples if name != DENSE):
            asked = _bound(case, name)
            rule = None if asked is None else "at most"
            found = ratio(samples, name, DENSE, rule, asked, f": {case}")
            self.findings.append(found)
            print(f"    {found.measured} x  {name}", flush=True)
            if name == EAGER:
                continue
            ours = self.backends.our_name(name)
            # Eager's forward pass makes the masked weight that its d_x reads, so d_x alone has no bound.
            rule, most = ("at most", EAGER_BOUND) if name == ours and case.op != "d_x" else (None, None)
            self.findings.append(ratio(samples, name, EAGER, rule, most, f": {case}"))
            if name != ours:
                self.findings.append(ratio(samples, name, ours, suffix=f": {case}"))

    def rows(self, ceilings: Mapping[int, CpuCeilings]) -> list[dict]:
        """Return one row per case and competitor. Shares use the ceilings of its thread count over the whole run."""
        return [
            self._row(case, name, samples, ceilings[case.threads]) for case, samples in self._timed for name in samples
        ]

    def _row(self, case: Case, name: str, samples: Samples, ceilings: CpuCeilings) -> dict:
        work = count_work(
            case.op, layers.FORMS[self.backends.our_name(name)], case.m, case.n, case.k, DTYPES[case.dtype]
        )
        share = ceilings.share(case.op, case.dtype, work, Spread.of(samples[name]).median)
        return {**vars(case), **comparison_row(samples, name, DENSE), "share": share, "target": _bound(case, name)}


def measure(measured: Measured, ceilings: CpuCeilings, cases: Iterable[Case], seconds: float) -> None:
    """Measure cases of torch's current thread count. Ceilings are sampled before each dtype and shape."""
    for (dtype, n, k), of_shape in groupby(cases, lambda case: (case.dtype, case.n, case.k)):
        ceilings.sample(dtype)
        made = LayerCompetitors(n, k, DTYPES[dtype])
        for case in of_shape:
            inputs = inputs_of(case.m, n, k, DTYPES[dtype])
            calls = {name: made.call(name, case.op, inputs) for name in measured.backends.competitors(COMPETITORS)}
            around = measured.backends.around
            if case.m * n * k / case.threads >= SLOW:
                samples = time_interleaved(calls, rounds=3, around=around)
            else:
                samples = time_within(calls, seconds, least=3, around=around)
            measured.add(case, samples)


def main(quick: bool = False, budget: Budget = STORED) -> None:
    """Print and store the answer of this process."""
    torch.manual_seed(0)
    measured, many = Measured(), torch.get_num_threads()
    by_threads = {many: budget.many} | ({} if many == 1 or quick else {1: budget.one})
    asked = select_cases(
        Case(op, dtype, n, k, m, threads)
        for threads, cases in by_threads.items()
        for dtype in DTYPES
        for (n, k), of_shape in cases
        for op, m in of_shape
    )
    ceilings = {}
    for threads, of_threads in groupby(asked, lambda case: case.threads):
        torch.set_num_threads(threads)
        ceilings[threads] = CpuCeilings(budget.ceilings)
        measure(measured, ceilings[threads], of_threads, budget.seconds)
    torch.set_num_threads(many)
    report(
        "cpu",
        f"A masked layer on a CPU, {many} threads and one, as ratios to a dense layer of the same dtype",
        measured.findings,
        printed=False,
        ceilings=[found.record(threads) for threads, found in ceilings.items()],
        cases=measured.rows(ceilings),
    )


def _bound(case: Case, name: str) -> float | None:
    return bound(instruction_set(), case.dtype, case.op, (case.n, case.k), case.m, case.threads, name)
