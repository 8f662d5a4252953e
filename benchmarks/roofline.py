"""Compute how close an op comes to the machine's ceilings: operations and bytes counted, ceilings measured in the run.

    share = max(flops / GEMM ceiling, bytes / copy ceiling) / time

Bytes are the least that must move: each operand read once, each result written once. The copy ceiling is that of main
memory. Matrices that stay in a cache from call to call can beat it, which gives a share above 1.

`ops` copies more than any cache holds. `cpu` reads as many bytes as the weight has, as a product of few tokens does,
and a cache may hold them.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from .harness import Spread

GEMM_SIZE = 2048
COPY_BYTES = 256 << 20  # eight times the share of L3 of most cores

# (op, form): what must move per weight, as (elements of the layer's dtype, other bytes). Forms: dense; scores, the mask
# from scores; held, the mask as bits and gradients added to a buffer; module, as held but with new fp32 gradients of
# the scores.
WEIGHT_TRAFFIC: dict[tuple[str, str], tuple[int, float]] = {
    ("forward", "dense"): (1, 0),  # weight
    ("forward", "scores"): (2, 0),  # weight, scores
    ("forward", "held"): (1, 1 / 8),  # weight, bits
    ("forward", "module"): (1, 1 / 8),
    ("d_x", "dense"): (1, 0),
    ("d_x", "scores"): (2, 0),
    ("d_x", "held"): (1, 1 / 8),
    ("d_x", "module"): (1, 1 / 8),
    ("d_scores", "dense"): (1, 0),  # d_weight
    ("d_scores", "scores"): (3, 0),  # d_scores, weight, scores
    ("d_scores", "held"): (2, 0),  # the buffer, read and written
    ("d_scores", "module"): (1, 4 + 1 / 8),  # weight; d_scores, signs
    ("threshold", "scores"): (1, 0),  # scores
    ("packing", "scores"): (1, 1 / 8),  # scores, bits
    ("optimiser", "int16"): (2, 2 * (2 + 1 + 1) + 1 / 8),  # gradient, weight; scores and moments read and written, bits
    ("optimiser", "fp32"): (2, 2 * (4 + 4 + 4) + 1 / 8),
    ("optimiser", "dense"): (0, 2 * (4 + 4 + 4) + 4),  # masters and moments read and written; fp32 gradient
}
PRODUCTS = ("forward", "d_x", "d_scores")


@dataclass(frozen=True)
class Work:
    """The least operations and bytes of an op."""

    flops: float
    bytes: float


def count_work(op: str, form: str, m: int, n: int, k: int, dtype: torch.dtype = torch.bfloat16) -> Work:
    """Count an op on M tokens and an (N, K) matrix; op "step" is the three products, each reading its inputs again."""
    if op == "step":
        parts = [count_work(product, form, m, n, k, dtype) for product in PRODUCTS]
        return Work(sum(part.flops for part in parts), sum(part.bytes for part in parts))
    elements, others = WEIGHT_TRAFFIC[op, form]
    of_weight = (elements * dtype.itemsize + others) * n * k
    if op not in PRODUCTS:
        return Work(0, of_weight)
    return Work(2 * m * n * k, of_weight + dtype.itemsize * m * (n + k))


@dataclass
class Ceilings:
    """GEMM in flop/s and copy in bytes/s, sampled during the whole run, like the competitors."""

    gemm: list[float] = field(default_factory=list)
    copy: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        size = (GEMM_SIZE, GEMM_SIZE)
        self._a, self._b, self._product = (torch.ones(size, dtype=torch.bfloat16) for _ in range(3))
        self._source, self._target = (torch.ones(COPY_BYTES, dtype=torch.uint8) for _ in range(2))

    def sample(self) -> None:
        """Take one sample of each."""
        took = least_seconds(lambda: torch.mm(self._a, self._b, out=self._product))
        self.gemm.append(2 * GEMM_SIZE**3 / took)
        took = least_seconds(lambda: self._target.copy_(self._source))
        self.copy.append(2 * COPY_BYTES / took)

    def share(self, work: Work, milliseconds: float) -> float:
        """Return the time that the ceilings allow / the time taken."""
        gemm, copy = Spread.of(self.gemm).median, Spread.of(self.copy).median
        return max(work.flops / gemm, work.bytes / copy) / (milliseconds * 1e-3)

    def record(self) -> dict[str, dict[str, float]]:
        """Return GFLOP/s and GB/s with quartiles."""
        named = (("gemm_gflops", self.gemm), ("copy_gb_per_s", self.copy))
        spreads = {name: Spread.of([value / 1e9 for value in values]) for name, values in named}
        return {name: vars(spread) for name, spread in spreads.items()}


def least_seconds(call: Callable[[], object], times: int = 1) -> float:
    """Return the least of ``times`` calls, after one untimed call."""
    call()
    took = []
    for _ in range(times):
        start = time.perf_counter()
        call()
        took.append(time.perf_counter() - start)
    return min(took)
