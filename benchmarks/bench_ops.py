"""Measure what each op costs compared with a dense layer, with other formulations, and with the machine's limits.

bf16, layers of SmolLM2-135M, LLaMA2-7B and LLaMA3.1-8B, M = 1 to 4096 tokens. Ratios are to the dense layer's same op
(d_weight for d_scores), round by round. Shares are of the roofline (see roofline.py).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby

import torch

from mft_kernels.timing import Samples, time_within

from . import cpu_targets
from . import layer_competitors as layers
from . import matrix_competitors as matrices
from .harness import Finding, Spread, comparison_row, instruction_set, ratio, report, select_cases
from .layer_competitors import LayerCompetitors, inputs_of
from .roofline import Ceilings, count_work
from .side_by_side import SideBySide

SMOLLM2 = ((576, 576), (192, 576), (1536, 576), (576, 1536))
LLAMA2_7B = ((4096, 4096), (11008, 4096), (4096, 11008))
LLAMA3_8B = ((14336, 4096), (1024, 4096))
SQUARE = (4096, 4096)
STEP_SHAPES = ((576, 1536), SQUARE)  # shapes of which the whole step, forward and backward, is measured too
TOKENS = (1, 8, 64, 512, 4096)
PAPER_TOKENS = 512  # tokens at which the paper's layer runs: it sorts all scores, so M hardly matters
FEW, FEWEST = 2e10, 1.5e11  # M N K from which fewer competitors run, and from which only ours and the dense layer run
SLOW = 2**25  # number of scores from which sort and kthvalue are not timed


@dataclass(frozen=True)
class Budget:
    """How much of the question is answered, and how long a case may take beyond its minimum rounds, in one process."""

    shapes: tuple[tuple[int, int], ...] = SMOLLM2 + LLAMA2_7B + LLAMA3_8B
    tokens: tuple[int, ...] = TOKENS
    seconds: float = 0.25
    least: int = 3


STORED = Budget()
QUICK = Budget(((576, 1536), SQUARE), (1, 64, 512), 0.1, 3)


@dataclass(frozen=True)
class Case:
    """An op on a shape; m is 0 if the op has no tokens."""

    op: str
    n: int
    k: int
    m: int

    def __str__(self) -> str:
        tokens = f", M = {self.m}" if self.m else ""
        return f"{self.op}, {self.n} x {self.k}{tokens}"


class Measured:
    """Findings and rows of all cases. Each is printed when it is measured."""

    def __init__(self) -> None:
        self.findings: list[Finding] = []
        self._timed: list[tuple[Case, str, str, Samples]] = []
        self.ceilings = Ceilings()
        self.backends = SideBySide.here()

    def add(self, case: Case, baseline: str, forms: Mapping[str, str], samples: Samples) -> None:
        """Add the samples of one case. ``forms`` names what ours move, for those whose share is known."""
        for name, values in samples.items():
            if name == baseline:
                if any(timed[:2] == (case, name) for timed in self._timed):
                    continue  # the paper's layer is timed against its own dense layer
                print(f"{case}: {Spread.of(values)} ms {name}", flush=True)
            else:
                print(f"    {ratio(samples, name, baseline).measured} x  {name}", flush=True)
            ours = self.backends.our_name(name)
            self._timed.append((case, name, forms.get(ours, ""), {name: values, baseline: samples[baseline]}))
            if self.backends.runs(name):
                rule = ("at most", bound) if (bound := _bound(case, name)) else (None, None)
                self.findings.append(ratio(samples, name, baseline, *rule, f": {case}"))
                if ours != name:
                    self.findings.append(ratio(samples, name, ours, suffix=f": {case}"))
            elif name == matrices.SORT:
                self.findings.append(ratio(samples, name, matrices.OURS, "at least", 10, f": {case}"))

    def rows(self) -> list[dict]:
        """Return one row per case and competitor. Shares use the ceilings of the whole run."""
        return [self._row(*timed) for timed in self._timed]

    def _row(self, case: Case, name: str, form: str, samples: Samples) -> dict:
        baseline = next((other for other in samples if other != name), name)
        row = vars(case) | comparison_row(samples, name, baseline)
        if form:
            work = count_work(case.op, form, case.m, case.n, case.k)
            row |= {**vars(work), "share": self.ceilings.share(work, Spread.of(samples[name]).median)}
        return row


def cases_of(n: int, k: int, budget: Budget) -> Iterator[Case]:
    """Yield forward, d_x, d_scores and, for two shapes, the whole step; then the work on the matrix."""
    for m in budget.tokens:
        for op in ("forward", "d_x", "d_scores", *(["step"] if (n, k) in STEP_SHAPES else [])):
            yield Case(op, n, k, m)
    for op in ("threshold", "packing", "optimiser"):
        yield Case(op, n, k, 0)


def measure_layer(measured: Measured, n: int, k: int, cases: Iterable[Case], budget: Budget) -> None:
    """Measure the cases of one shape that have tokens."""
    made = LayerCompetitors(n, k)
    for m, of_tokens in groupby(cases, lambda case: case.m):
        inputs = inputs_of(m, n, k)
        for case in of_tokens:
            for names, least in _groups(m, n, k, budget):
                calls = {name: made.call(name, case.op, inputs) for name in measured.backends.competitors(names)}
                samples = time_within(calls, budget.seconds, least=least, around=measured.backends.around)
                measured.add(case, layers.DENSE, layers.FORMS, samples)


def measure_matrix(measured: Measured, n: int, k: int, cases: Iterable[Case], budget: Budget) -> None:
    """Measure the cases of one shape that have no tokens: threshold, packing and optimiser step."""
    makers: dict[str, Callable[[], matrices.Calls]] = {
        "threshold": lambda: matrices.threshold_calls(n, k, slow=n * k < SLOW),
        "packing": lambda: matrices.packing_calls(n, k),
        "optimiser": lambda: matrices.optimiser_calls(n, k),
    }
    for case in cases:
        with measured.backends.around(matrices.OURS):
            calls = measured.backends.calls(makers[case.op]())
        samples = time_within(calls, budget.seconds, least=2, around=measured.backends.around)
        measured.add(case, matrices.BASELINES[case.op], matrices.FORMS, samples)


def main(quick: bool = False) -> None:
    """Print and store the answer."""
    budget = QUICK if quick else STORED
    torch.manual_seed(0)
    measured = Measured()
    asked = select_cases(case for shape in budget.shapes for case in cases_of(*shape, budget))
    for (n, k, with_tokens), cases in groupby(asked, lambda case: (case.n, case.k, case.m > 0)):
        measured.ceilings.sample()
        (measure_layer if with_tokens else measure_matrix)(measured, n, k, cases, budget)
    report(
        "ops",
        f"Ops of one layer in bf16, {torch.get_num_threads()} threads, as ratios to a dense layer's",
        measured.findings,
        printed=False,
        ceilings=measured.ceilings.record(),
        cases=measured.rows(),
    )


def _groups(m: int, n: int, k: int, budget: Budget) -> Iterator[tuple[list[str], int]]:
    """Yield the competitors that are timed together against the dense layer, and their minimum rounds."""
    work = m * n * k
    if work >= FEWEST:
        yield [layers.DENSE, layers.FROM_SCORES], 2
    elif work >= FEW:
        yield [layers.DENSE, layers.FROM_SCORES, layers.HELD, layers.EAGER], 2
    else:
        yield [layers.DENSE, *layers.OURS, layers.EAGER, layers.COMPILED, layers.LORA], budget.least
    if m == PAPER_TOKENS:
        yield [layers.DENSE, layers.PAPER], 2


def _bound(case: Case, name: str) -> float | None:
    if case.op != "step":
        return None
    shape = case.n, case.k
    return cpu_targets.bound(instruction_set(), "bf16", case.op, shape, case.m, torch.get_num_threads(), name)
