"""Masked products of one dense matrix, from scores or a packed mask, and the sums that make its scores' gradient."""

from typing import Any

from torch import Tensor

from . import served
from .checks import check_factors, check_linear, check_mode, check_product, check_tensor
from .products import check_mask_of_scores, check_mask_of_words, keep_by_scores, keep_by_words
from .route import Op
from .straight_through import StraightThrough


def masked_linear(
    x: Tensor,
    weight: Tensor,
    scores: Tensor,
    threshold: Tensor,
    bias: Tensor | None = None,
    *,
    mode: str = "magnitude",
    backend: str = "auto",
) -> Tensor:
    """Compute ``y = x @ where(|scores| >= threshold, weight, 0).T + bias``.

    The gradient passes straight through the comparison (arXiv 2503.22764):
    d_scores = (grad_output.T @ x) * weight * sign(scores), for the dropped weights' scores too.
    In mode "value", keep is scores >= threshold and d_scores has no sign factor.

    Args:
        x: (..., K), floating.
        weight: (N, K), dtype of x. Its gradient, if it requires one, is where(keep, grad_output.T @ x, 0).
        scores: (N, K), fp32 or a 16-bit float.
        threshold: () or (N,), one per row, on the device of scores; cast to their dtype. See kept_threshold.
        bias: (N,), dtype of x.
        backend: "auto", or the name of the backend that must serve the call; see backend_report.
    Returns: (..., N) in x's dtype; accumulated in fp32. Under autocast x, weight and bias are cast, scores never.
    Raises: ValueError for shapes, devices or mode, TypeError for dtypes, RuntimeError for a backend that cannot serve.
    """
    return _MASKED_LINEAR(x, weight, scores, threshold, bias, mode, backend)


def masked_linear_packed(
    x: Tensor, weight: Tensor, packed: Tensor, bias: Tensor | None = None, *, backend: str = "auto"
) -> Tensor:
    """Compute ``y = x @ where(mask, weight, 0).T + bias`` with the mask given as bits (see pack_mask).

    x, weight and bias get gradients; there are no scores.

    Args:
        x: (..., K).
        weight: (N, K).
        packed: int32 (N, ceil(K / 32)).
        bias: (N,).
    Returns: (..., N) in x's dtype.
    """
    return MASKED_LINEAR_PACKED(x, weight, packed, bias, backend)


def accumulate_score_grad(
    out: Tensor,
    grad_output: Tensor,
    x: Tensor,
    weight: Tensor | None,
    *,
    scores: Tensor | None = None,
    signs: Tensor | None = None,
    mode: str = "magnitude",
    backend: str = "auto",
) -> Tensor:
    """Compute ``out += (grad_output.T @ x) * weight * sign(scores)`` in place, without a weight-sized temporary.

    If weight is None, compute out += grad_output.T @ x. Weight and sign are constant between two optimiser steps, so
    score_step can multiply by them once per step.

    Args:
        out: (N, K), fp32 or a 16-bit float, contiguous.
        grad_output: (..., N), dtype of x.
        x: (..., K), dtype of weight if that is given, with the leading dimensions of grad_output.
        weight: (N, K), or None. If None, scores and signs must be None too, in either mode.
        scores: (N, K), for the sign in mode "magnitude".
        signs: int32 (N, ceil(K / 32)), the bits of pack_signs, in place of scores; valid only if no score is exactly 0.
    Returns: out.
    """
    _ACCUMULATE(out, grad_output, x, weight, scores, signs, mode, backend)
    return out


# ---------------------------------------------------------------------------------------------- the ops' definitions


_MASKED_LINEAR_BACKWARD = Op(
    "masked_linear_backward",
    lambda call: served.gradients(call, call.weight, keep_by_scores(call)),
    is_gradient=True,
    short=True,
)
_MASKED_LINEAR = Op(
    "masked_linear",
    lambda call: served.product(call, call.weight, keep_by_scores(call)),
    check=lambda call: check_mask_of_scores(check_linear(call)),
    gradient=StraightThrough("masked_linear", _MASKED_LINEAR_BACKWARD),
    short=True,
)
#: Returns d_x, d_weight, d_scores and d_bias.
MASKED_LINEAR_PACKED_BACKWARD = Op(
    "masked_linear_packed_backward",
    lambda call: served.gradients(call, call.weight, keep_by_words(call)),
    is_gradient=True,
    short=True,
)
MASKED_LINEAR_PACKED = Op(
    "masked_linear_packed",
    lambda call: served.product(call, call.weight, keep_by_words(call)),
    check=lambda call: check_mask_of_words(check_linear(call)),
    gradient=StraightThrough("masked_linear_packed", MASKED_LINEAR_PACKED_BACKWARD),
    short=True,
)


def _check_sums(call: Any) -> Any:
    out, weight = call.out, call.weight
    check_mode(call.mask_mode)
    if weight is not None:
        check_linear(call)
        check_tensor("out", out)
        if out.shape != weight.shape or not out.is_contiguous():
            raise ValueError(f"out must be contiguous and match weight {tuple(weight.shape)}, got {tuple(out.shape)}")
    check_factors(call)
    check_product(call)
    return call


_ACCUMULATE = Op("accumulate_score_grad", lambda call: served.accumulate(call, None), check=_check_sums, short=True)
