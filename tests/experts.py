"""Inputs of the ops over experts, their comparison with the reference, and the same products by single-matrix ops."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from by_name import oracle
from products import assert_same
from torch import Tensor

import mft_kernels
from mft_kernels import reference

#: Rows of each expert: none at both ends and in the middle, one row, a tile's edge. 3 more rows belong to no expert.
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

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """Return (left, right) of left.T @ right, which has the shape of one expert's weight."""
        return (self.x, self.grad_output) if self.transposed else (self.grad_output, self.x)

    def words(self, mode: str = "magnitude") -> Tensor:
        """Return the mask of the scores as packed bits."""
        each = zip(self.scores.cpu(), self.threshold.cpu())
        return torch.stack([reference.pack_mask(s, t, mode) for s, t in each]).to(self.scores.device)

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
    """Return small integers as in testing.integer_inputs: exact in any order if N, K and an expert's rows are <= 60."""
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
    """Compute masked_linear of each expert with the reference; autograd can follow."""
    parts = []
    for e, rows in enumerate(t.groups()):
        w, s = (weight[e].T, scores[e].T) if t.transposed else (weight[e], scores[e])
        parts.append(mft_kernels.masked_linear(x[rows], w, s, t.threshold[e], bias[e], mode=mode, backend="reference"))
    nobodys = len(x) - int(t.offsets[-1])
    return torch.cat([*parts, x.new_zeros(nobodys, bias.shape[1])])


def assert_product_equals_reference(by, *arguments) -> None:
    """by: an object that has the ops of a backend by name."""
    assert_same(by.grouped_product(*arguments), oracle.grouped_product(*_on_cpu(arguments)), small=False)


def assert_sums_equal_reference(
    by,
    t: Experts,
    source: str | None,
    out_dtype: torch.dtype,
    *,
    accumulate: bool,
    mode: str = "magnitude",
    copy: Callable[[Tensor], Tensor] = Tensor.clone,
) -> None:
    """source: where the sign comes from, "scores" or "signs"; None: neither weight nor sign. copy: of the buffer."""
    scores = t.scores if source == "scores" else t.scores.masked_fill(t.scores == 0, 1)  # 0 has no sign bit
    signs = torch.stack([reference.pack_signs(one)[0] for one in scores.cpu()]).to(scores.device)
    sign = {"scores": (scores, None), "signs": (None, signs), None: (None, None)}[source]
    out = (torch.arange(t.weight.numel()).view(t.weight.shape) % 5 - 2).to(t.weight.device, out_dtype)
    if not accumulate:
        out.fill_(torch.nan)
    arguments = (out, *t.factors, t.offsets, None if source is None else t.weight, *sign, mode, accumulate)
    expected, out = _on_cpu(arguments), copy(out)
    by.grouped_score_grad(out, *arguments[1:])
    oracle.grouped_score_grad(*expected)
    assert_same(out, expected[0], small=False)


def _on_cpu(arguments):
    return [a.cpu().clone() if isinstance(a, Tensor) else a for a in arguments]
