"""The ops of namespace ``mft``: the checked functions that users call, then schemas, fakes and autograd.

Each op finds its implementation in ``backends``; nothing here computes. A call that nothing else has to see goes there
without PyTorch's dispatcher; see direct.py.
"""

import torch
from torch import Tensor

from .. import reference
from .._ops import ops
from ..backends.table import choose, short_ways
from ..reference.fixed_point import selectable
from ..reference.linear import Gradients
from .checks import (
    NonFiniteScores,
    check_device,
    check_floating,
    check_keep_ratio,
    check_linear,
    check_mode,
    check_packed,
    check_product,
    check_scores,
    check_tensor,
    check_threshold,
    check_transforms,
    check_whole,
)
from .direct import is_direct, is_direct_but_for_autograd, is_short
from .library import (
    define,
    define_autocast,
    define_autograd,
    define_no_double_backward,
    gradient_shapes,
    increment_version,
    unchanged,
)

# ---------------------------------------------------------------------------------------------- what users call


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
    if backend == "auto" and is_short(x, weight, scores, threshold, optional=(bias,)):
        y = _by_short_way("masked_linear", weight.dtype, x, weight, scores, threshold, bias, mode)
        if y is not None:
            return y
    check_mode(mode)
    check_linear(x, weight, bias)
    check_scores(scores, weight)
    check_threshold(threshold, scores)
    threshold = threshold.to(scores.dtype)
    if is_direct_but_for_autograd(x, weight, scores, threshold, bias):
        return _differentiable(x, weight, scores, threshold, bias, mode, backend)
    check_transforms("masked_linear", x, weight, scores, bias)
    return ops.masked_linear(x, weight, scores, threshold, bias, mode, backend)


def masked_linear_packed(
    x: Tensor, weight: Tensor, packed: Tensor, bias: Tensor | None = None, *, backend: str = "auto"
) -> Tensor:
    """y = x @ where(mask, weight, 0).T + bias, the mask given as bits (see pack_mask).

    Gradients go to x, weight and bias; no score is involved.

    Args: x (..., K); weight (N, K); packed int32 (N, ceil(K / 32)); bias (N,).
    Returns: (..., N) in x's dtype.
    """
    if backend == "auto" and is_short(x, weight, packed, optional=(bias,)):
        y = short_product_of_packed(x, weight, packed, bias)
        if y is not None:
            return y
    check_linear(x, weight, bias)
    check_packed("packed", packed, weight.shape)
    check_device("packed", packed, "weight", weight)
    if is_direct_but_for_autograd(x, weight, packed, bias):
        return _differentiable_packed(x, weight, packed, bias, backend)
    check_transforms("masked_linear_packed", x, weight, bias)
    return ops.masked_linear_packed(x, weight, packed, bias, backend)


def short_product_of_packed(x: Tensor, weight: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor | None:
    """masked_linear_packed by the short way of what "auto" takes; None where there is none."""
    return _by_short_way("masked_linear_packed", weight.dtype, x, weight, packed, bias)


def product_of_packed(x: Tensor, weight: Tensor, packed: Tensor, bias: Tensor | None, backend: str) -> Tensor:
    """What masked_linear_packed computes, unchecked and out of the dispatcher's sight: for use within an op."""
    y = short_product_of_packed(x, weight, packed, bias) if backend == "auto" else None
    if y is not None:
        return y
    return choose("masked_linear_packed", x.device, (weight.dtype,), backend)(x, weight, packed, bias)


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
    check_mode(mode)
    bare = weight is None and scores is None and signs is None and backend == "auto"
    if bare and is_short(out, grad_output, x) and _by_short_way("accumulate_product", x.dtype, out, grad_output, x):
        increment_version(out)
        return out
    check_transforms("accumulate_score_grad", out, grad_output, x, weight, scores, in_place=True)
    if weight is None:
        if scores is not None or signs is not None:
            given = "scores" if scores is not None else "signs"
            raise ValueError(f"{given} must be None where weight is (score_step applies sign and weight), got a tensor")
        check_product(out, grad_output, x)
        _add_score_grad(out, grad_output, x, None, None, None, mode, backend)
        return out
    check_linear(x, weight, None)
    check_tensor("out", out)
    if out.shape != weight.shape or not out.is_contiguous():
        raise ValueError(f"out must be contiguous and match weight {tuple(weight.shape)}, got {tuple(out.shape)}")
    check_product(out, grad_output, x)
    if mode == "magnitude" and scores is None and signs is None:
        raise ValueError('mode "magnitude" needs scores or signs, got neither')
    if scores is not None:
        check_scores(scores, weight)
    if signs is not None:
        check_packed("signs", signs, weight.shape)
        check_device("signs", signs, "weight", weight)
    _add_score_grad(out, grad_output, x, weight, scores, signs, mode, backend)
    return out


def kept_threshold(scores: Tensor, keep_ratio: float, *, mode: str = "magnitude", backend: str = "auto") -> Tensor:
    """The k-th largest |scores| (scores in mode "value"), k = numel - int((1 - keep_ratio) * numel).

    Exact, without a sort where a kernel serves it, and without a host synchronisation.

    Args:
        scores: any shape, floating or int16 (see fixed_point.py).
    Returns: () in the scores' dtype; +inf if k is 0; NaN if a score on an accelerator is not finite (of int16 scores,
        the codes that read so as fp16).
    Raises: ValueError if keep_ratio is outside [0, 1], or if scores on the CPU are not all finite.
    """
    check_whole("scores", scores)
    check_mode(mode)
    check_keep_ratio(keep_ratio)
    check_tensor("scores", scores)
    keys = selectable(scores.detach())
    check_floating("scores", keys)
    return ops.kept_threshold(keys, keep_ratio, mode, backend).view(scores.dtype)


def pack_mask(scores: Tensor, threshold: Tensor, *, mode: str = "magnitude", backend: str = "auto") -> Tensor:
    """The mask as bits: bit j % 32 of word j // 32 of row n tells whether weight (n, j) is kept.

    Args: scores (N, K), floating or int16 (see fixed_point.py); threshold () or (N,), for int16 scores a code too. Of
        experts scores are (E, N, K), and threshold () or (E,).
    Returns: int32 (N, ceil(K / 32)), of experts (E, N, ceil(K / 32)); padding bits are 0.
    """
    check_whole("scores", scores)
    check_mode(mode)
    check_tensor("scores", scores)
    check_tensor("threshold", threshold)
    if scores.dtype == torch.int16 and threshold.dtype != torch.int16:
        raise TypeError(
            f"threshold must be an int16 code as the scores are, got {threshold.dtype}; see kept_threshold and "
            "fixed_from_float"
        )
    keys, threshold = selectable(scores.detach()), selectable(threshold)
    check_floating("scores", keys)
    if keys.dim() not in (2, 3):
        raise ValueError(f"scores must be (N, K), or of experts (E, N, K), got shape {tuple(scores.shape)}")
    check_threshold(threshold, keys)
    threshold = threshold.to(keys.dtype)
    if keys.dim() == 2:
        return ops.pack_mask(keys, threshold, mode, backend)
    if threshold.dim() == 1:
        threshold = threshold.repeat_interleave(keys.shape[1])  # one a row
    packed = ops.pack_mask(keys.flatten(0, 1), threshold, mode, backend)
    return packed.unflatten(0, keys.shape[:2])


def unpack_mask(packed: Tensor, shape: tuple[int, ...] | torch.Size) -> Tensor:
    """The boolean mask of ``shape`` (N, K) or (E, N, K) that pack_mask packed."""
    if len(shape) not in (2, 3):
        raise ValueError(f"shape must be (N, K), or of experts (E, N, K), got {tuple(shape)}")
    check_packed("packed", packed, shape)
    return ops.unpack_mask(packed, list(shape))


def gradients_of_packed(
    grad_output: Tensor,
    x: Tensor,
    weight: Tensor,
    packed: Tensor,
    scores: Tensor | None,
    signs: Tensor | None,
    mode: str,
    output_mask: list[bool],
    backend: str,
) -> Gradients:
    """d_x, d_weight, d_scores and d_bias of masked_linear_packed, for use in a backward pass: unchecked."""
    if backend == "auto" and is_short(grad_output, x, weight, packed, optional=(scores, signs)):
        arguments = grad_output, x, weight, packed, scores, signs, mode, output_mask
        grads = _by_short_way("masked_linear_packed_backward", weight.dtype, *arguments)
        if grads:
            return tuple(grads)
    direct = is_direct(grad_output, x, weight, packed, scores, signs)
    run = _gradients_of_packed if direct else ops.masked_linear_packed_backward
    return run(grad_output, x, weight, packed, scores, signs, mode, output_mask, backend)


# ---------------------------------------------------------------------------------------------- their definition


def _fake_linear(x, weight, *_):
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _fake_packed(scores):
    return scores.new_empty((scores.shape[0], (scores.shape[1] + 31) // 32), dtype=torch.int32)


def _by_short_way(op, dtype, *arguments):
    """What the short way of what "auto" takes for an op makes, which checks for itself; None where there is none."""
    way = short_ways.get((op, dtype))
    return None if way is None else way(*arguments)


def _masked_linear(x, weight, scores, threshold, bias, mode, backend):
    if backend == "auto":
        y = _by_short_way("masked_linear", weight.dtype, x, weight, scores, threshold, bias, mode)
        if y is not None:
            return y
    run = choose("masked_linear", x.device, (weight.dtype, scores.dtype), backend)
    return run(x, weight, scores, threshold, bias, mode)


def _gradients_by(grad_output, x, weight, scores, threshold, mode, output_mask, backend):
    """d_x, d_weight, d_scores and d_bias of masked_linear, unchecked: by the way that they may go."""
    if backend == "auto" and is_short(grad_output, x, weight, scores, threshold):
        arguments = grad_output, x, weight, scores, threshold, mode, output_mask
        grads = _by_short_way("masked_linear_backward", weight.dtype, *arguments)
        if grads:
            return grads
    direct = is_direct(grad_output, x, weight, scores, threshold)
    run = _gradients if direct else ops.masked_linear_backward
    return run(grad_output, x, weight, scores, threshold, mode, output_mask, backend)


def _gradients(grad_output, x, weight, scores, threshold, mode, output_mask, backend):
    run = choose("masked_linear_backward", weight.device, (weight.dtype, scores.dtype), backend)
    return run(grad_output, x, weight, scores, threshold, mode, output_mask)


def _gradients_of_packed(grad_output, x, weight, packed, scores, signs, mode, output_mask, backend):
    dtypes = (weight.dtype,) if scores is None else (weight.dtype, scores.dtype)
    run = choose("masked_linear_packed_backward", weight.device, dtypes, backend)
    return run(grad_output, x, weight, packed, scores, signs, mode, output_mask)


@torch.no_grad()
def _add_score_grad(out, grad_output, x, weight, scores, signs, mode, backend):
    direct = is_direct(out, grad_output, x, weight, scores, signs)
    run = _accumulate_score_grad if direct else ops.accumulate_score_grad
    run(out, grad_output, x, weight, scores, signs, mode, backend)


def _accumulate_score_grad(out, grad_output, x, weight, scores, signs, mode, backend):
    if weight is None:
        choose("accumulate_product", out.device, (x.dtype, out.dtype), backend)(out, grad_output, x)
    else:
        run = choose("accumulate_score_grad", out.device, (weight.dtype, out.dtype), backend)
        run(out, grad_output, x, weight, scores, signs, mode)
    increment_version(out)


def _kept_threshold(scores, keep_ratio, mode, backend):
    threshold = choose("kept_threshold", scores.device, (scores.dtype,), backend)(scores, keep_ratio, mode)
    # Inside the op, so that compiled code and vmap meet it too. An accelerator would have to be waited for.
    if scores.device.type == "cpu" and threshold.isnan():
        raise NonFiniteScores(scores)
    return threshold


define(
    "masked_linear(Tensor x, Tensor weight, Tensor scores, Tensor threshold, Tensor? bias, "
    "str mode, str backend) -> Tensor",
    _fake_linear,
    _masked_linear,
)

define(
    "masked_linear_backward(Tensor grad_output, Tensor x, Tensor weight, Tensor scores, Tensor threshold, "
    "str mode, bool[4] output_mask, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    lambda grad_output, x, weight, scores, threshold, mode, output_mask, backend: gradient_shapes(
        output_mask, grad_output, (*grad_output.shape[:-1], weight.shape[1]), weight, scores.dtype
    ),
    _gradients,
)

define(
    "masked_linear_packed(Tensor x, Tensor weight, Tensor packed, Tensor? bias, str backend) -> Tensor",
    _fake_linear,
    product_of_packed,
)

define(
    "masked_linear_packed_backward(Tensor grad_output, Tensor x, Tensor weight, Tensor packed, Tensor? scores, "
    "Tensor? signs, str mode, bool[4] output_mask, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    lambda grad_output, x, weight, packed, scores, signs, mode, output_mask, backend: gradient_shapes(
        output_mask,
        grad_output,
        (*grad_output.shape[:-1], weight.shape[1]),
        weight,
        torch.float32 if scores is None else scores.dtype,
    ),
    _gradients_of_packed,
)

# "mask_mode": the functionalisation of mutating ops (torch 2.13) trips over an argument called "mode".
define(
    "accumulate_score_grad(Tensor(a!) out, Tensor grad_output, Tensor x, Tensor? weight, Tensor? scores, "
    "Tensor? signs, str mask_mode, str backend) -> ()",
    lambda *args: None,
    _accumulate_score_grad,
)

define(
    "kept_threshold(Tensor scores, float keep_ratio, str mode, str backend) -> Tensor",
    lambda scores, keep_ratio, mode, backend: scores.new_empty(()),
    _kept_threshold,
)

define(
    "pack_mask(Tensor scores, Tensor threshold, str mode, str backend) -> Tensor",
    lambda scores, threshold, mode, backend: _fake_packed(scores),
    lambda scores, threshold, mode, backend: choose("pack_mask", scores.device, (scores.dtype,), backend)(
        scores, threshold, mode
    ),
)

define(
    "pack_signs(Tensor scores, str backend) -> (Tensor, Tensor)",
    lambda scores, backend: (_fake_packed(scores), scores.new_empty((), dtype=torch.int64)),
    lambda scores, backend: choose("pack_signs", scores.device, (scores.dtype,), backend)(scores),
)

define(
    "unpack_mask(Tensor packed, SymInt[] shape) -> Tensor",
    lambda packed, shape: packed.new_empty(shape, dtype=torch.bool),
    lambda packed, shape: reference.unpack_mask(packed, shape).contiguous(),
)


def _save_for_masked_linear(ctx, inputs, output):
    x, weight, scores, threshold, _, ctx.mode, ctx.backend = inputs
    needs_x = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
    ctx.save_for_backward(x if needs_x else None, weight, scores, threshold)


def _masked_linear_backward(ctx, grad_output):
    x, weight, scores, threshold = unchanged(ctx)
    wants = ctx.needs_input_grad
    output_mask = [wants[0], wants[1], wants[2], wants[4]]
    x = grad_output if x is None else x  # not read unless d_weight or d_scores is wanted
    d_x, d_weight, d_scores, d_bias = _gradients_by(
        grad_output, x, weight, scores, threshold, ctx.mode, output_mask, ctx.backend
    )
    grads = [g if wanted else None for g, wanted in zip((d_x, d_weight, d_scores, d_bias), output_mask)]
    return grads[0], grads[1], grads[2], None, grads[3], None, None


def _save_for_masked_linear_packed(ctx, inputs, output):
    x, weight, packed, _, ctx.backend = inputs
    ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight, packed)


def _masked_linear_packed_backward(ctx, grad_output):
    x, weight, packed = unchanged(ctx)
    wants = ctx.needs_input_grad
    output_mask = [wants[0], wants[1], False, wants[3]]
    x = grad_output if x is None else x
    d_x, d_weight, _, d_bias = gradients_of_packed(
        grad_output, x, weight, packed, None, None, "value", output_mask, ctx.backend
    )
    return d_x if wants[0] else None, d_weight if wants[1] else None, None, d_bias if wants[3] else None, None


_differentiable = define_autograd("masked_linear", _masked_linear, _save_for_masked_linear, _masked_linear_backward)
_differentiable_packed = define_autograd(
    "masked_linear_packed", product_of_packed, _save_for_masked_linear_packed, _masked_linear_packed_backward
)
define_no_double_backward("masked_linear_backward")
define_no_double_backward("masked_linear_packed_backward")
define_autocast("masked_linear", casts=(0, 1, 4))
define_autocast("masked_linear_packed", casts=(0, 1, 3))
