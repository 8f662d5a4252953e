"""The masked product over experts while their masks are held; see held.py."""

import torch
from torch import Tensor

from ..ops.grouped import GRADIENTS_OF_GROUPED_PACKED, accumulate_score_grad_grouped, masked_linear_grouped_packed
from .held import Weight, check_versions, dense, detached, version


class _HeldGroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, anchor, weight: Weight, packed, offsets, bias, grad_buffer, transposed):
        ctx.save_for_backward(x, offsets)  # alone: weight and mask are the module's
        ctx.held = weight, packed, grad_buffer, transposed
        ctx.versions = version(weight), version(packed)
        return masked_linear_grouped_packed(x, dense(weight), packed, offsets, bias, transposed=transposed)

    @staticmethod
    def backward(ctx, grad_output):
        x, offsets = ctx.saved_tensors
        weight, packed, grad_buffer, transposed = ctx.held
        check_versions(ctx.versions, weight, packed)
        d_x, of_x = None, [True, False, False, False]
        if ctx.needs_input_grad[0]:
            d_x = GRADIENTS_OF_GROUPED_PACKED(
                grad_output, x, dense(weight), packed, None, None, offsets, transposed, "value", of_x, "auto"
            )[0]
        accumulate_score_grad_grouped(grad_buffer, grad_output, x, offsets, transposed=transposed)
        return d_x, None, None, None, None, None, None, None


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
    """masked_linear_grouped_packed; its backward pass adds grad_output.T @ x of each expert into grad_buffer, in place.

    No gradient of the weight's size is made, x and offsets are all that is saved, and the buffer of an expert without
    rows is not touched. d_x is computed if x asks for it; weight and bias get no gradient.

    Args:
        x: (T, K). weight: (E, N, K), transposed (E, K, N), a function that returns it, called again in the backward
            pass, or codes, decoded for each product. packed: its mask as bits. offsets: int32 (E,). bias: (E, N).
        grad_buffer: of the weight's shape, contiguous, fp32 or a 16-bit float; None: nothing is accumulated.
    Returns: (T, N) in x's dtype.
    """
    if grad_buffer is None or not torch.is_grad_enabled():
        # Detached, so that the packed op's own backward makes d_x alone.
        given = detached(weight) if isinstance(weight, Tensor) else dense(weight)
        frozen = None if bias is None else detached(bias)
        return masked_linear_grouped_packed(x, given, packed, offsets, frozen, transposed=transposed)
    anchor = None if x.requires_grad else torch.empty(0, device=x.device, requires_grad=True)
    return _HeldGroupedLinear.apply(x, anchor, weight, packed, offsets, bias, grad_buffer, transposed)
