"""Experts in one parameter held as codes. Each product decodes all experts, and frees the decoded weight."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mft.models.codes.weight import QuantizedWeight
from mft.models.routed_experts import bias_of_rows, unmasked_product


class QuantizedGroupedLinear(nn.Module):
    """unmasked_product over frozen weights that are held quantised; no dense weight is saved for the backward pass.

    Args: quantized: the matrix (E * N, K), or (E * K, N) if transposed. experts: E. bias: (E, N).
    Shapes: x (T, K), sorted by expert; offsets int32 (E,), see masked_linear_grouped.
    """

    def __init__(
        self, quantized: QuantizedWeight, experts: int, bias: Tensor | None = None, *, transposed: bool = False
    ) -> None:
        super().__init__()
        self.quantized, self.experts, self.transposed = quantized, experts, transposed
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    @classmethod
    def from_weight(
        cls, weight: Tensor, bias: Tensor | None = None, *, transposed: bool = False, kind: str = "nf4"
    ) -> "QuantizedGroupedLinear":
        """Quantise weight (E, N, K), or (E, K, N) if transposed. The bias is shared."""
        return cls(quantize_experts(weight, kind), len(weight), bias, transposed=transposed)

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        y = _Product.apply(x, offsets, self)
        return y if self.bias is None else y + bias_of_rows(self.bias, offsets, len(x))

    def extra_repr(self) -> str:
        return f"experts={self.experts}, bias={self.bias is not None}, transposed={self.transposed}"


def quantize_experts(weight: Tensor, kind: str) -> QuantizedWeight:
    """Quantise weight (E, N, K) as the matrix (E * N, K). Raises: as QuantizedWeight.quantize."""
    return QuantizedWeight.quantize(weight.detach().flatten(0, 1), kind)


def dense_experts(quantized: QuantizedWeight, experts: int) -> Tensor:
    """Decode the matrix of quantize_experts to (E, N, K); each call makes a new tensor."""
    return quantized.dense().unflatten(0, (experts, -1))


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, offsets: Tensor, layer: QuantizedGroupedLinear) -> Tensor:
        ctx.save_for_backward(offsets)
        ctx.layer, ctx.x_dtype = layer, x.dtype
        return unmasked_product(x, dense_experts(layer.quantized, layer.experts), offsets, None, layer.transposed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, None, None]:
        (offsets,), layer = ctx.saved_tensors, ctx.layer
        if not ctx.needs_input_grad[0]:
            return None, None, None
        weight = dense_experts(layer.quantized, layer.experts)
        d_x = unmasked_product(grad_output, weight, offsets, None, not layer.transposed)
        return d_x.to(ctx.x_dtype), None, None
