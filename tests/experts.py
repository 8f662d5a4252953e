"""Inputs of the ops over experts, and the same expert by expert by the ops of one matrix."""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

import mft_kernels

#: Rows an expert: none at the ends and between, one, a tile's edge; 3 rows are nobody's.
ROWS = (0, 1, 7, 0, 33, 16, 0)
NOBODYS = 3


@dataclass
class Experts:
    """x (T, K), weight and scores (E, N, K) or transposed (E, K, N), bias (E, N), offsets (E,), grad_output (T, N)."""

    x: Tensor
    weight: Tensor
    scores: Tensor
    bias: Tensor
    offsets: Tensor
    grad_output: Tensor
    threshold: Tensor  # (E,)
    transposed: bool

    def groups(self) -> list[slice]:
        ends = [0, *self.offsets.tolist()]
        return [slice(begin, end) for begin, end in pairwise(ends)]


def integer_experts(
    n: int,
    k: int,
    dtype: torch.dtype = torch.float32,
    scores_dtype: torch.dtype = torch.float32,
    *,
    rows: tuple[int, ...] = ROWS,
    nobodys: int = NOBODYS,
    transposed: bool = False,
    seed: int = 0,
) -> Experts:
    """Small integers as of testing.integer_inputs: exact in any order while N, K and an expert's rows are <= 60."""
    generator = torch.Generator().manual_seed(seed)

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high + 1, shape, generator=generator)

    experts, total = len(rows), sum(rows) + nobodys
    shape = (experts, k, n) if transposed else (experts, n, k)
    return Experts(
        x=integers(-1, 1, total, k).to(dtype),
        weight=integers(-2, 2, *shape).to(dtype),
        scores=integers(-3, 3, *shape).to(scores_dtype),
        bias=integers(-1, 1, experts, n).to(dtype),
        offsets=torch.tensor(rows).cumsum(0).int(),
        grad_output=integers(-1, 1, total, n).to(dtype),
        threshold=integers(0, 4, experts).to(scores_dtype),
        transposed=transposed,
    )


def one_by_one(t: Experts, x: Tensor, weight: Tensor, scores: Tensor, bias: Tensor, mode: str) -> Tensor:
    """masked_linear of each expert by the reference, in autograd's sight."""
    parts = []
    for e, rows in enumerate(t.groups()):
        w, s = (weight[e].T, scores[e].T) if t.transposed else (weight[e], scores[e])
        parts.append(mft_kernels.masked_linear(x[rows], w, s, t.threshold[e], bias[e], mode=mode, backend="reference"))
    nobodys = len(x) - int(t.offsets[-1])
    return torch.cat([*parts, x.new_zeros(nobodys, bias.shape[1])])
