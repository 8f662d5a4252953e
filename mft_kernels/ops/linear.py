"""The masked product of one dense matrix, from scores or from a packed mask, and the sums of its scores' gradient."""

import torch
from torch import Tensor

from ..operands import Keep
from . import served
from .checks import (
    check_device,
    check_linear,
    check_mode,
    check_packed,
    check_product,
    check_scores,
    check_tensor,
    check_threshold,
)
from .route import Op
from .served import sign_of
from .straight_through import straight_through


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
    """y = x @ where(|scores| >= threshold, weight, 0).T + bias

    The gradient passes straight through the comparison (arXiv 2503.22764):
    d_scores = (grad_output.T @ x) * weight * sign(scores), for the dropped weights' scores too.
    In mode "value", keep is scores >= threshold and d_scores has no sign factor.

    Args:
        x: (..., K), floating.
        weight: (N, K), dtype of x; its gradient, where(keep, grad_output.T @ x, 0), only if it asks for one.
        scores: (N, K), fp32 or a 16-bit float.
        threshold: () or one a row (N,), on the device of scores, cast to their dtype; see kept_threshold.
        bias: (N,), dtype of x.
        backend: "auto" or the name of one that must serve the call; see backend_report.
    Returns: (..., N) in x's dtype; accumulated in fp32. Under autocast x, weight and bias are cast, scores never.
    Raises: ValueError for shapes, devices or mode, TypeError for dtypes, RuntimeError for a backend that cannot serve.
    """
    return _MASKED_LINEAR(x, weight, scores, threshold, bias, mode, backend)


def masked_linear_packed(
    x: Tensor, weight: Tensor, packed: Tensor, bias: Tensor | None = None, *, backend: str = "auto"
) -> Tensor:
    """y = x @ where(mask, weight, 0).T + bias, the mask given as bits (see pack_mask).

    Gradients go to x, weight and bias; no score is involved.

    Args: x (..., K); weight (N, K); packed int32 (N, ceil(K / 32)); bias (N,).
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
    """out += (grad_output.T @ x) * weight * sign(scores), in place, without a temporary of the weight's size.

    With weight None, out += grad_output.T @ x: weight and sign are constant between two optimiser steps, so score_step
    can multiply by them once a step.

    Args:
        out: (N, K), fp32 or a 16-bit float, contiguous.
        grad_output: (..., N); x: (..., K), both of weight's dtype, with equal leading dimensions.
        weight: (N, K), or None; then scores and signs must be None too, whatever the mode.
        scores: (N, K), for the sign in mode "magnitude"; or
        signs: int32 (N, ceil(K / 32)), the bits of pack_signs, valid when no score is exactly 0.
    Returns: out.
    """
    _ACCUMULATE(out, grad_output, x, weight, scores, signs, mode, backend)
    return out


# ---------------------------------------------------------------------------------------------- from scores


def _check(x, weight, scores, threshold, bias, mode, backend):
    check_mode(mode)
    check_linear(x, weight, bias)
    check_scores(scores, weight)
    check_threshold(threshold, scores)
    return x, weight, scores, threshold.to(scores.dtype), bias, mode, backend


def _product(x, weight, scores, threshold, bias, mode, backend):
    return served.product("masked_linear", x, weight, Keep(scores, threshold, mode), bias, backend)


def _gradients(grad_output, x, weight, scores, threshold, mode, output_mask, backend):
    op, keep, sign = "masked_linear_backward", Keep(scores, threshold, mode), sign_of(scores, None, mode)
    return served.gradients(op, grad_output, x, weight, keep, sign, scores.dtype, output_mask, backend)


_MASKED_LINEAR_BACKWARD = Op("masked_linear_backward", _gradients, is_gradient=True, short=(5, 2))
_MASKED_LINEAR = Op(
    "masked_linear",
    _product,
    check=_check,
    gradient=straight_through(_MASKED_LINEAR_BACKWARD, scores=2, bias=4),
    casts=(0, 1, 4),
    short=(4, 1),
)

# ---------------------------------------------------------------------------------------------- from a packed mask


def _check_packed(x, weight, packed, bias, backend):
    check_linear(x, weight, bias)
    check_packed("packed", packed, weight.shape)
    check_device("packed", packed, "weight", weight)
    return x, weight, packed, bias, backend


def _product_of_packed(x, weight, packed, bias, backend):
    return served.product("masked_linear_packed", x, weight, Keep(packed), bias, backend)


def _gradients_of_packed(grad_output, x, weight, packed, scores, signs, mode, output_mask, backend):
    op, sign = "masked_linear_packed_backward", sign_of(scores, signs, mode)
    dtype = torch.float32 if scores is None else scores.dtype
    return served.gradients(op, grad_output, x, weight, Keep(packed), sign, dtype, output_mask, backend)


#: d_x, d_weight, d_scores and d_bias of masked_linear_packed, from the arguments of its schema.
GRADIENTS_OF_PACKED = Op("masked_linear_packed_backward", _gradients_of_packed, is_gradient=True, short=(4, 2))
MASKED_LINEAR_PACKED = Op(
    "masked_linear_packed",
    _product_of_packed,
    check=_check_packed,
    gradient=straight_through(
        GRADIENTS_OF_PACKED, bias=3, arrange=lambda tensors, settings: (*tensors, None, None, "value")
    ),
    casts=(0, 1, 3),
    short=(3, 1),
)

# ---------------------------------------------------------------------------------------------- sums


def check_factors(weight: Tensor | None, scores: Tensor | None, signs: Tensor | None, mode: str) -> None:
    """Raise unless scores or signs, where they are needed, fit the weight that they are a factor beside."""
    if weight is None:
        if scores is not None or signs is not None:
            given = "scores" if scores is not None else "signs"
            raise ValueError(f"{given} must be None where weight is (score_step applies sign and weight), got a tensor")
        return
    if mode == "magnitude" and scores is None and signs is None:
        raise ValueError('mode "magnitude" needs scores or signs, got neither')
    if scores is not None:
        check_scores(scores, weight)
    if signs is not None:
        check_packed("signs", signs, weight.shape)
        check_device("signs", signs, "weight", weight)


def _check_sums(out, grad_output, x, weight, scores, signs, mode, backend):
    check_mode(mode)
    if weight is not None:
        check_linear(x, weight, None)
        check_tensor("out", out)
        if out.shape != weight.shape or not out.is_contiguous():
            raise ValueError(f"out must be contiguous and match weight {tuple(weight.shape)}, got {tuple(out.shape)}")
    check_factors(weight, scores, signs, mode)
    check_product(out, grad_output, x)
    return out, grad_output, x, weight, scores, signs, mode, backend


def _accumulate(out, grad_output, x, weight, scores, signs, mode, backend):
    sign = None if weight is None else sign_of(scores, signs, mode)
    served.accumulate("accumulate_score_grad", out, grad_output, x, weight, sign, None, backend)


_ACCUMULATE = Op("accumulate_score_grad", _accumulate, check=_check_sums, short=(3, 2), writes=(0,))
