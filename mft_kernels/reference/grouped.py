"""The oracle of the products over experts: plain PyTorch, one expert after the other.

E experts, T rows. ``weight``, ``scores`` and ``out`` are (E, N, K), as they lie in memory; the rows of expert e are
those from offsets[e - 1] (0 for the first) to offsets[e], and rows past the last offset are nobody's. Arguments are
trusted here, the public door in ``grouped`` checks them.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .. import reference


def grouped_product(
    x: Tensor,
    weight: Tensor,
    scores: Tensor | None,
    threshold: Tensor | None,
    packed: Tensor | None,
    offsets: Tensor,
    bias: Tensor | None,
    mode: str,
    transposed: bool,
) -> Tensor:
    """y[i] = x[i] @ where(keep[e], weight[e], 0).T + bias[e]; transposed: without the .T. Nobody's rows are 0.

    keep comes from scores (E, N, K) and threshold (E,), or from packed, int32 (E, N, ceil(K / 32)).
    bias is (E, N), or transposed (E, K).
    """
    y = x.new_zeros(len(x), weight.shape[2 if transposed else 1])
    for e, rows in _groups(offsets, len(x)):
        if packed is not None:
            keep = reference.unpack_mask(packed[e], list(weight.shape[1:]))
        else:
            keep = reference.keep_mask(scores[e], threshold[e], mode)  # type: ignore[index]
        masked = torch.where(keep, weight[e], 0)
        y[rows] = reference.linear(x[rows], masked.t() if transposed else masked, None if bias is None else bias[e])
    return y


def grouped_score_grad(
    out: Tensor,
    grad_output: Tensor,
    x: Tensor,
    offsets: Tensor,
    weight: Tensor | None,
    scores: Tensor | None,
    signs: Tensor | None,
    mode: str,
    accumulate: bool,
) -> None:
    """out[e] = [out[e] +] (grad_output.T @ x of the rows of e) [* weight[e]] [* sign(scores[e])].

    grad_output (T, N), x (T, K). An expert without rows has exactly 0, or stays as it is. The sign, in mode "magnitude"
    and with a weight, comes from the bits of signs where given, else from scores.
    """
    if not accumulate:
        out.zero_()
    for e, rows in _groups(offsets, len(x)):
        grad, tokens = grad_output[rows], x[rows]
        if weight is None:
            reference.accumulate_product(out[e], grad, tokens)
        else:
            sign, bits = (None if t is None else t[e] for t in (scores, signs))
            reference.accumulate_score_grad(out[e], grad, tokens, weight[e], sign, bits, mode)


def kept_thresholds(scores: Tensor, keep_ratio: float, mode: str) -> Tensor:
    """kept_threshold of each of scores (E, ...): (E,)."""
    return torch.stack([reference.kept_threshold(each, keep_ratio, mode) for each in scores])


def _groups(offsets: Tensor, rows: int) -> Iterator[tuple[int, slice]]:
    """The experts that have rows, and which; what lies outside of the rows is left out."""
    begin = 0
    for e, end in enumerate(offsets.tolist()):
        end = min(max(end, begin), rows)
        if begin < end:
            yield e, slice(begin, end)
        begin = end
