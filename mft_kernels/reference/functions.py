"""The reference: all functions of a backend in plain PyTorch, on any device and in any floating dtype.

M tokens, N out_features, K in_features, E experts. Kernels take the same arguments and are checked against these
functions. Arguments are trusted here: the public functions in ``ops`` check them.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ..codes import Codes
from ..operands import Experts, Keep, KeepByTask, Sums, Weight
from .in_place import drop as drop
from .in_place import put_aside as put_aside
from .in_place import put_back as put_back
from .linear import (
    grad_of_linear,
    keep_mask,
    kept_threshold,
    linear,
    pack_mask,
    pack_signs,
    signs_of,
    unpack_mask,
    weight_gradient,
)
from .step import score_step

pack = pack_mask
signs = pack_signs
step = score_step


def product(
    a: Tensor, weight: Weight, keep: Keep | KeepByTask | None, bias: Tensor | None, *, transposed: bool = False
) -> Tensor:
    """Compute a @ where(keep, weight, 0).T + bias, or a @ where(keep, weight, 0) + bias if transposed.

    Args:
        a: (..., K), or (..., N) if transposed. For experts, (rows, K) or (rows, N), sorted by expert.
        weight: (N, K); codes of such a matrix; or experts (E, N, K), each of which multiplies its own rows.
        keep: None keeps all. A dropped weight counts as +0, even if it is NaN or Inf.
        bias: (N,), or (K,) if transposed; for experts (E, N) or (E, K); or None.
    Returns: (..., N), or (..., K) if transposed, in a's dtype. Rows of no expert are 0, those of an unknown task NaN.
    """
    if isinstance(weight, Experts):
        return _product_of_experts(a, weight, keep, bias, transposed)
    if isinstance(weight, Codes):
        weight = weight.dense(a.dtype)
    if isinstance(keep, KeepByTask):
        return _product_per_task(a, weight, keep, lambda masked: _multiply(a, masked, bias, transposed))
    masked = weight if keep is None else torch.where(kept(keep, weight.shape), weight, 0)
    return _multiply(a, masked, bias, transposed)


def score_grad(sums: Sums) -> None:
    """Compute d_scores and d_weight in place.

    d_scores = [d_scores +] (grad_output.T @ x) [* weight] [* sign], d_weight = where(keep, grad_output.T @ x, 0)

    A sum or a sign of 0 times a weight that is NaN or infinite is NaN, also without tokens. An expert without rows
    gets 0.
    """
    weight, sign, d_scores, offsets = sums.weight, sums.sign, sums.d_scores, sums.offsets
    if offsets is None:
        product_of_both = weight_gradient(sums.grad_output, sums.x)
        if sums.d_weight is not None:
            assert sums.keep is not None
            sums.d_weight.copy_(torch.where(kept(sums.keep, sums.d_weight.shape), product_of_both, 0))
        if d_scores is not None:
            found = _score_grad(product_of_both, weight, sign, d_scores.dtype)
            d_scores.add_(found) if sums.accumulate else d_scores.copy_(found)
        return
    assert d_scores is not None
    if not sums.accumulate:
        d_scores.zero_()
    for e, rows in _groups(offsets, len(sums.x)):
        factor, own_sign = (None if t is None else t[e] for t in (weight, sign))
        score_grad(Sums(sums.grad_output[rows], sums.x[rows], factor, own_sign, d_scores[e], sums.accumulate))


def select(scores: Tensor, keep_ratio: float, mode: str, *, each: bool = False) -> Tensor:
    """Return the k-th largest key of the scores, (); or, if each, that of each expert of scores (E, ...), (E,).

    See kept_threshold.
    """
    if each:
        return torch.stack([kept_threshold(one, keep_ratio, mode) for one in scores])
    return kept_threshold(scores, keep_ratio, mode)


def decode(weight: Codes, dtype: torch.dtype) -> Tensor:
    """Return the dense matrix (N, K) that codes hold."""
    return weight.dense(dtype)


def kept(keep: Keep, shape: Sequence[int]) -> Tensor:
    """Return the boolean mask of ``shape``, (N, K) or (E, N, K)."""
    if keep.words is not None:
        return unpack_mask(keep.words, list(shape))
    assert keep.thresholds is not None
    if keep.source.dim() == 2:
        return keep_mask(keep.source, keep.thresholds, keep.mode)
    return torch.stack([keep_mask(each, t, keep.mode) for each, t in zip(keep.source, keep.thresholds.unbind())])


# ---------------------------------------------------------------------------------------------- below: private


def _multiply(a: Tensor, masked: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    if not transposed:
        return linear(a, masked, bias)
    return grad_of_linear(a, masked) if bias is None else linear(a, masked.t(), bias)


def _product_per_task(a: Tensor, weight: Tensor, keep: KeepByTask, multiply: Callable[[Tensor], Tensor]) -> Tensor:
    """Multiply all rows once per mask, and take from each product the rows with that mask.

    So nothing waits for an accelerator.
    """
    tasks = keep.tasks.view(-1, *(1,) * (a.dim() - 1))
    y = torch.where(tasks == -1, multiply(weight), torch.nan)
    for task, packed in enumerate(keep.masks):
        masked = torch.where(unpack_mask(packed, list(weight.shape)), weight, 0)
        y = torch.where(tasks == task, multiply(masked), y)
    return y


def _product_of_experts(a: Tensor, weight: Experts, keep, bias: Tensor | None, transposed: bool) -> Tensor:
    masked = torch.where(kept(keep, weight.matrices.shape), weight.matrices, 0)
    y = a.new_zeros(len(a), masked.shape[2 if transposed else 1])
    for e, rows in _groups(weight.offsets, len(a)):
        each = masked[e].t() if transposed else masked[e]
        y[rows] = linear(a[rows], each, None if bias is None else bias[e])
    return y


def _groups(offsets: Tensor, rows: int) -> Iterator[tuple[int, slice]]:
    """Yield each expert that has rows, and these rows. Offsets past the rows are cut off."""
    begin = 0
    for e, end in enumerate(offsets.tolist()):
        end = min(max(end, begin), rows)
        if begin < end:
            yield e, slice(begin, end)
        begin = end


def _score_grad(summed: Tensor, weight: Tensor | None, sign: Tensor | None, dtype: torch.dtype) -> Tensor:
    if weight is None and sign is None:
        return summed
    wide = torch.promote_types(dtype, torch.float32)
    d_scores = summed.to(wide)
    if weight is not None:
        d_scores = d_scores * weight
    if sign is not None and sign.dtype == torch.int32:
        d_scores = d_scores * unpack_mask(sign, list(summed.shape)).to(wide).mul_(2).sub_(1)
    elif sign is not None:
        d_scores = d_scores * signs_of(sign)
    return d_scores.to(dtype)
