"""Measure a whole step of a layer in a loop of one's own: forward, backward and optimiser.

A MaskedLinear with MaskAdamW as they are by default, the dense layer with torch's fused AdamW on its weight, and LoRA
of rank 8 with the same on its two factors. After each step the scores select a new mask, which the next forward finds.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mft_kernels import MaskAdamW, MaskedLinear
from mft_kernels.timing import time_within

from .cpu_ceilings import DTYPES
from .harness import Finding, comparison_row, ratio, report, select_cases
from .tables import case_name

DENSE, LORA, OURS = "dense", "LoRA of rank 8", "ours, from scores"
RANK = 8
GOALS = {16: 1.3, 128: 1.3, 512: 1.05, 1024: 1.05}  # by tokens: times the dense layer's step, at most


@dataclass(frozen=True)
class Budget:
    """The cases, and how long a case may take beyond its minimum rounds, in one process."""

    shapes: tuple[tuple[int, int], ...] = ((576, 1536), (1024, 1024), (4096, 4096), (11008, 4096))
    tokens: tuple[int, ...] = (1, 16, 128, 512, 1024)
    seconds: float = 0.5


STORED = Budget()
QUICK = Budget(shapes=((576, 1536), (1024, 1024)), tokens=(16, 512), seconds=0.3)


@dataclass(frozen=True)
class Case:
    """A shape, a dtype and a number of tokens."""

    dtype: str
    n: int
    k: int
    m: int

    def columns(self) -> dict[str, Any]:
        """Return what a row of the record begins with."""
        return {"op": "loop step", **vars(self), "threads": torch.get_num_threads()}

    def __str__(self) -> str:
        return case_name(self.columns())


class _Lora(nn.Module):
    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = linear.weight.detach()
        self.a = nn.Parameter(torch.randn(RANK, linear.in_features, dtype=self.weight.dtype) * 0.02)
        self.b = nn.Parameter(torch.zeros(linear.out_features, RANK, dtype=self.weight.dtype))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) + F.linear(F.linear(x, self.a), self.b)


def _step(layer: nn.Module, optimizer: Any, m: int, n: int, k: int, dtype: torch.dtype) -> Callable[[], None]:
    x, grad = torch.randn(m, k, dtype=dtype, requires_grad=True), torch.randn(m, n, dtype=dtype)

    def step() -> None:
        layer(x).backward(grad)
        optimizer.step()
        optimizer.zero_grad()
        x.grad = None

    return step


def main(quick: bool = False) -> None:
    """Print and store the answer of this process."""
    torch.manual_seed(0)
    budget = QUICK if quick else STORED
    cases = select_cases(Case(d, n, k, m) for d in DTYPES for n, k in budget.shapes for m in budget.tokens)
    findings: list[Finding] = []
    rows: list[dict] = []
    for case in cases:
        dtype = DTYPES[case.dtype]
        dense = nn.Linear(case.k, case.n, bias=False, dtype=dtype)
        masked, lora = MaskedLinear.from_linear(nn.Linear(case.k, case.n, bias=False, dtype=dtype)), _Lora(dense)
        of = {
            DENSE: (dense, torch.optim.AdamW(dense.parameters(), lr=2e-5, fused=True)),
            LORA: (lora, torch.optim.AdamW(lora.parameters(), lr=2e-5, fused=True)),
            OURS: (masked, MaskAdamW([masked.scores], lr=2e-5)),
        }
        sizes = case.m, case.n, case.k, dtype
        samples = time_within({name: _step(*made, *sizes) for name, made in of.items()}, budget.seconds, least=5)
        goal = GOALS.get(case.m)
        found = ratio(samples, OURS, DENSE, None if goal is None else "at most", goal, f": {case}")
        findings += [found, ratio(samples, OURS, LORA, suffix=f": {case}")]
        rows += [
            case.columns() | comparison_row(samples, name, DENSE) | {"target": goal if name == OURS else None}
            for name in samples
        ]
        print(f"{case}: {found.measured} x dense, {findings[-1].measured} x LoRA", flush=True)
    title = f"A layer's step with its optimiser on a CPU, {torch.get_num_threads()} threads"
    report("loop", title, findings, printed=False, cases=rows)
