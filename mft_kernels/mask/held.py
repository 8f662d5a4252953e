"""The masked product while a mask is held: it reads bits, and its backward pass adds to a buffer.

Between two optimiser steps neither weight nor mask changes. So a micro-batch reads 1 bit per weight instead of the
scores, and its share of the gradient is grad_output.T @ x alone. score_step applies weight and sign once per step.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..ops.grouped import GROUPED_PACKED_BACKWARD, accumulate_score_grad_grouped, masked_linear_grouped_packed
from ..ops.linear import MASKED_LINEAR_PACKED_BACKWARD, accumulate_score_grad, masked_linear_packed
from ..ops.quantized import QuantizedMatrix

# A function makes the weight again for each product. A quantised matrix is decoded within the product.
Weight = Tensor | Callable[[], Tensor] | QuantizedMatrix


def masked_linear_held(
    x: Tensor, weight: Weight, packed: Tensor, bias: Tensor | None = None, *, grad_buffer: Tensor | None = None
) -> Tensor:
    """Compute ``y = x @ where(mask, weight, 0).T + bias``. The backward pass does grad_buffer += grad_output.T @ x.

    No gradient of the weight's size is made, and only x is saved. d_x is computed if x requires it. Weight and bias get
    no gradient.

    Args:
        x: (..., K).
        weight: (N, K); or a function that returns it, which is called again in the backward pass; or codes.
        packed: int32 (N, ceil(K / 32)); see pack_mask.
        grad_buffer: (N, K) contiguous, fp32 or a 16-bit float, changed in place. None: nothing is accumulated.
    Returns: (..., N) in x's dtype.
    """
    return _held_product(x, weight, packed, bias, grad_buffer)


def masked_linear_grouped_held(
    x: Tensor,
    weight: Weight,
    packed: Tensor,
    offsets: Tensor,
    bias: Tensor | None = None,
    *,
    transposed: bool = False,
    grad_buffer: Tensor | None = None,
) -> Tensor:
    """Compute masked_linear_held for each expert on its own rows. Only x and offsets are saved.

    The buffer of an expert without rows is not touched.

    Args:
        x: (T, K).
        weight: (E, N, K), or (E, K, N) if transposed; or a function that returns it, which is called again in the
            backward pass; or codes, which are decoded for each product.
        packed: the weight's mask as bits.
        offsets: int32 (E,).
        bias: (E, N).
        grad_buffer: the weight's shape, contiguous, fp32 or a 16-bit float. None: nothing is accumulated.
    Returns: (T, N) in x's dtype.
    """
    return _held_product(x, weight, packed, bias, grad_buffer, offsets, transposed)


# ---------------------------------------------------------------------------------------------- below: private


class _HeldLinear(torch.autograd.Function):
    """The product with a gradient buffer. ``experts``: offsets and transposed; empty for one matrix."""

    @staticmethod
    def forward(ctx, x, anchor, weight, packed, bias, grad_buffer, *experts):
        ctx.save_for_backward(x, *experts[:1])  # only these: weight and mask belong to the module
        ctx.held = weight, packed, grad_buffer, experts[1:]
        ctx.versions = _version(weight), _version(packed)
        return _product(x, weight, packed, bias, *experts)

    @staticmethod
    def backward(ctx, grad_output):
        x, *offsets = ctx.saved_tensors
        weight, packed, grad_buffer, transposed = ctx.held
        experts = *offsets, *transposed
        _check_versions(ctx.versions, weight, packed)
        d_x = _d_x(grad_output, x, weight, packed, *experts) if ctx.needs_input_grad[0] else None
        _add_sums(grad_buffer, grad_output, x, *experts)
        return d_x, *(None for _ in ctx.needs_input_grad[1:])


def _held_product(x, weight, packed, bias, grad_buffer, *experts) -> Tensor:
    if grad_buffer is None or not torch.is_grad_enabled():
        # Detached, so that the packed op's own backward computes only d_x.
        weight = _detached(weight) if isinstance(weight, Tensor) else weight
        return _product(x, weight, packed, None if bias is None else _detached(bias), *experts)
    anchor = None if x.requires_grad else torch.empty(0, device=x.device, requires_grad=True)
    return _HeldLinear.apply(x, anchor, weight, packed, bias, grad_buffer, *experts)


def _product(x: Tensor, weight: Weight, packed: Tensor, bias: Tensor | None, *experts) -> Tensor:
    if experts:
        offsets, transposed = experts
        return masked_linear_grouped_packed(x, _dense(weight), packed, offsets, bias, transposed=transposed)
    if isinstance(weight, QuantizedMatrix):
        return weight.masked_linear(x, packed, bias)
    return masked_linear_packed(x, _dense(weight), packed, bias)


def _d_x(grad_output: Tensor, x: Tensor, weight: Weight, packed: Tensor, *experts) -> Tensor:
    if not experts and isinstance(weight, QuantizedMatrix):
        return weight.masked_d_x(grad_output, packed)
    gradients = GROUPED_PACKED_BACKWARD if experts else MASKED_LINEAR_PACKED_BACKWARD
    wanted = [True, False, False, False]
    return gradients(grad_output, x, _dense(weight), packed, None, None, *experts, "value", wanted, "auto")[0]


def _add_sums(grad_buffer: Tensor, grad_output: Tensor, x: Tensor, *experts) -> None:
    if experts:
        offsets, transposed = experts
        accumulate_score_grad_grouped(grad_buffer, grad_output, x, offsets, transposed=transposed)
    else:
        accumulate_score_grad(grad_buffer, grad_output, x, None)


def _dense(weight: Weight) -> Tensor:
    """Return the weight as a tensor; make it if necessary."""
    if isinstance(weight, QuantizedMatrix):
        return weight.dense()
    return weight if isinstance(weight, Tensor) else weight()


def _detached(tensor: Tensor) -> Tensor:
    """Return the tensor, detached if it requires a gradient."""
    return tensor.detach() if tensor.requires_grad else tensor


def _version(tensor: Weight) -> int | None:
    """Return a tensor's version counter, which in-place changes raise, or None.

    Inference tensors, functions and codes have none.
    """
    return tensor._version if isinstance(tensor, Tensor) and not tensor.is_inference() else None


def _check_versions(before: tuple[int | None, int | None], weight: Weight, packed: Tensor) -> None:
    """Raise RuntimeError if weight or packed was changed since these were their versions."""
    for name, tensor, was in zip(("weight", "packed"), (weight, packed), before):
        if _version(tensor) != was:
            assert isinstance(tensor, Tensor), "what has no version keeps it"
            raise RuntimeError(
                f"{name} must stay as it is until the backward pass, got {tuple(tensor.shape)} modified by an "
                f"inplace operation since the forward pass: call backward() before {name} changes"
            )
