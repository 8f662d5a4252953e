"""The cpu backend over experts: one call of the C++ library for all of them.

Each expert's product is that of cpu.py's matrices, by the path that the library's model chooses for its rows
(MFT_AUTOTUNE measures none of them). Several experts are shared out over the threads whole, so that none is waited for.
A weight with gaps or transposed is made contiguous an expert at a time, and only where there are rows.
"""

from torch import Tensor

from ...reference.linear import kept_count
from .. import built


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

    The bias is added in fp32, before the one rounding, in both layouts.
    """
    mask = (None if t is None else t.contiguous() for t in (scores, threshold, packed))
    bias = None if bias is None else bias.contiguous()
    return built.cpu_ops.grouped_product(
        x.contiguous(), weight, *mask, offsets.contiguous(), bias, mode == "magnitude", transposed, "auto"
    )


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
    """out[e] = [out[e] +] (grad_output.T @ x of the rows of e) [* weight[e]] [* sign(scores[e])], in place."""
    if weight is None or mode == "value":  # no sign factor
        scores = signs = None
    elif signs is not None:
        scores, signs = None, signs.contiguous()
    elif scores is not None:
        scores = scores.contiguous()
    built.cpu_ops.grouped_score_grad_(
        out, grad_output.contiguous(), x.contiguous(), offsets.contiguous(), weight, scores, signs, accumulate, "auto"
    )


def kept_thresholds(scores: Tensor, keep_ratio: float, mode: str) -> Tensor:
    """The k-th largest key of each of scores (E, ...); see kept_threshold."""
    k = kept_count(scores[0].numel(), keep_ratio)
    return built.cpu_ops.kept_thresholds(scores.contiguous(), k, mode == "magnitude")
