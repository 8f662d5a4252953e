"""The cuda backend's products over experts: csrc/cuda/grouped_sm80.cuh, one launch for all experts, nothing waited for.

Which rows are whose the kernels read from the offsets, on the device; see reference_grouped.
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
    """One launch. Scores that it does not read are packed first, in one an expert: those in the other 16-bit type, and
    all where rows are no whole, aligned chunks of 16 bytes.
    """
    return built.cuda_ops.grouped_product(
        _rows(x),
        _matrices(weight),
        None if scores is None else _matrices(scores),
        None if threshold is None else threshold.contiguous(),
        None if packed is None else packed.contiguous(),
        offsets.contiguous(),
        None if bias is None else bias.contiguous(),
        mode == "magnitude",
        transposed,
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
    """One launch; weight and sign are applied where the sums end, without a temporary of their size."""
    sign = weight is not None and mode == "magnitude"
    built.cuda_ops.grouped_score_grad_(
        out,
        _rows(grad_output),
        _rows(x),
        offsets.contiguous(),
        None if weight is None else _matrices(weight),
        _matrices(scores) if sign and signs is None and scores is not None else None,
        signs.contiguous() if sign and signs is not None else None,
        accumulate,
    )


def kept_thresholds(scores: Tensor, keep_ratio: float, mode: str) -> Tensor:
    """kept_threshold of each of scores (E, ...), its launches an expert after the other."""
    return built.cuda_ops.kept_thresholds(
        scores.contiguous(), kept_count(scores[0].numel(), keep_ratio), mode == "magnitude"
    )


def _rows(t: Tensor) -> Tensor:
    """The matrix itself where its rows have unit stride and do not overlap (expanded ones do), else a copy."""
    rows, columns = t.shape
    return t if (columns <= 1 or t.stride(1) == 1) and (rows <= 1 or t.stride(0) >= columns) else t.contiguous()


def _matrices(t: Tensor) -> Tensor:
    """The experts' matrices themselves where each is as _rows asks, wherever it lies; else a copy."""
    _, rows, columns = t.shape
    return t if (columns <= 1 or t.stride(2) == 1) and (rows <= 1 or t.stride(1) >= columns) else t.contiguous()
