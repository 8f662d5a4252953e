"""The masked product while a mask is held: bits in, and the backward pass adds into a buffer instead of returning.

Between two optimiser steps neither weight nor mask changes, so a micro-batch needs 1 bit a weight of the scores, and
its share of the gradient is grad_output.T @ x alone: weight and sign are multiplied in by score_step, once a step.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..ops.linear import GRADIENTS_OF_PACKED, accumulate_score_grad, masked_linear_packed
from ..ops.quantized import QuantizedMatrix

# A function makes the weight anew for each product; a quantised matrix is decoded in it.
Weight = Tensor | Callable[[], Tensor] | QuantizedMatrix


class _HeldLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, anchor, weight: Weight, packed, bias, grad_buffer):
        ctx.save_for_backward(x)  # alone: weight and mask are the module's
        ctx.held = weight, packed, grad_buffer
        ctx.versions = version(weight), version(packed)
        return _product(x, weight, packed, bias)

    @staticmethod
    def backward(ctx, grad_output):
        (x,) = ctx.saved_tensors
        weight, packed, grad_buffer = ctx.held
        check_versions(ctx.versions, weight, packed)
        d_x = None
        if ctx.needs_input_grad[0] and isinstance(weight, QuantizedMatrix):
            d_x = weight.masked_d_x(grad_output, packed)
        elif ctx.needs_input_grad[0]:
            d_x = GRADIENTS_OF_PACKED(
                grad_output, x, dense(weight), packed, None, None, "value", [True, False, False, False], "auto"
            )[0]
        accumulate_score_grad(grad_buffer, grad_output, x, None)
        return d_x, None, None, None, None, None


def masked_linear_held(
    x: Tensor, weight: Weight, packed: Tensor, bias: Tensor | None = None, *, grad_buffer: Tensor | None = None
) -> Tensor:
    """y = x @ where(mask, weight, 0).T + bias; its backward pass does grad_buffer += grad_output.T @ x, in place.

    No gradient of the weight's size is made, and x is all that is saved. d_x is computed if x asks for it; weight and
    bias get no gradient.

    Args:
        x: (..., K). weight: (N, K), or a function that returns it, called again in the backward pass, or codes.
        packed: int32 (N, ceil(K / 32)); see pack_mask.
        grad_buffer: (N, K) contiguous, fp32 or a 16-bit float; None: nothing is accumulated.
    Returns: (..., N) in x's dtype.
    """
    if not torch.is_grad_enabled():
        return _product(x, weight, packed, bias)
    if grad_buffer is None:
        # Detached, so that the packed op's own backward makes d_x alone.
        weight = detached(weight) if isinstance(weight, Tensor) else weight
        return _product(x, weight, packed, None if bias is None else detached(bias))
    anchor = None if x.requires_grad else torch.empty(0, device=x.device, requires_grad=True)
    return _HeldLinear.apply(x, anchor, weight, packed, bias, grad_buffer)


def _product(x: Tensor, weight: Weight, packed: Tensor, bias: Tensor | None) -> Tensor:
    if isinstance(weight, QuantizedMatrix):
        return weight.masked_linear(x, packed, bias)
    return masked_linear_packed(x, dense(weight), packed, bias)


# ---------------------------------------------------------------------------------------------- for experts too


def dense(weight: Weight) -> Tensor:
    """The weight, made where it has to be."""
    if isinstance(weight, QuantizedMatrix):
        return weight.dense()
    return weight if isinstance(weight, Tensor) else weight()


def detached(tensor: Tensor) -> Tensor:
    """Without a way to a gradient; itself where there is none."""
    return tensor.detach() if tensor.requires_grad else tensor


def version(tensor: Weight) -> int | None:
    """What a change in place raises; None of what has none: a function, and an inference tensor."""
    return tensor._version if isinstance(tensor, Tensor) and not tensor.is_inference() else None


def check_versions(before: tuple[int | None, int | None], weight: Weight, packed: Tensor) -> None:
    """Raise RuntimeError if weight or packed was changed since these were their versions."""
    for name, tensor, was in zip(("weight", "packed"), (weight, packed), before):
        if version(tensor) != was:
            assert isinstance(tensor, Tensor), "what has no version keeps it"
            raise RuntimeError(
                f"{name} must stay as it is until the backward pass, got {tuple(tensor.shape)} modified by an "
                f"inplace operation since the forward pass: call backward() before {name} changes"
            )
