"""Quantise the base of a model: which linears hold their weight as codes, and how these layers compute.

If a kernel decodes the codes (QuantizedMatrix.is_fused), neither the product of a masked layer nor its d_x makes a
dense matrix. One exists only while d_scores is computed, which is as large, and in frozen layers during products of
many tokens. Otherwise a dense matrix exists during each product, and is made again for the backward pass. Codes are
never trained.

Experts in one parameter always follow the second way: no kernel decodes them.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from mft.masks.convert import check_unwrapped, masked_modules, split_attentions
from mft.masks.export import keep_base_hash
from mft.masks.masked_experts import mask_experts
from mft.models.codes.quantized_experts import QuantizedGroupedLinear, dense_experts, quantize_experts
from mft.models.codes.weight import QuantizedWeight, quantized_weights
from mft.models.head_input import read_in_one_piece
from mft.models.linears import find_candidates, layer_stacks, linear_named, weight_name
from mft.quantizers import quantizer
from mft_kernels import MaskedGroupedLinear, MaskedLayer, MaskedLinear
from mft_kernels.internal import (
    GROUPED_PACKED,
    GROUPED_PACKED_BACKWARD,
    MASKED_LINEAR_PACKED_BACKWARD,
    CurrentMask,
    NonFiniteScores,
    Weight,
    current_mask,
    is_seen_by_others,
    unchanged,
)


def quantize_model(model: nn.Module, kind: str = "nf4", *, masked: bool = False) -> nn.Module:
    """Quantise the frozen linears and experts of the decoder layers, in place; everything else stays as it is.

    Weights are quantised and freed one after the other, on their device. Mask the model first: scores then start from
    the exact weights, and an export records on which exact weights the masks were learned.

    Args:
        model: masked or not, unquantised. Trainable layers are left alone.
        kind: a format of mft/quantizers.py: "nf4", "nf4-dq" (with double quantisation) or "int8".
        masked: quantise the masked layers' weights too.
    Returns: the same model.
    Raises: ValueError if nothing can be quantised, or if a module cannot be, which it names; RuntimeError if the NF4
        library is missing. The model is then unchanged, with one exception: if a weight is not finite, the weights
        before it are quantised.
    """
    quantizer(kind).check_library()
    check_unwrapped(model)
    _check_unquantized(model)
    names = _quantizable(model, masked)
    if masked:
        keep_base_hash(model)
    split_attentions(model, names)
    for name in names:
        path, _, part = name.rpartition(".")
        parent: Any = model.get_submodule(path)
        module = getattr(parent, part)
        try:
            if isinstance(module, MaskedLayer):
                _quantize_masked(module, kind)
            elif isinstance(module, nn.Parameter):
                mask_experts(parent, part, functools.partial(QuantizedGroupedLinear.from_weight, kind=kind))
            else:
                setattr(parent, part, QuantizedLinear.from_linear(module, kind))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    read_in_one_piece(model)
    return model


@torch.no_grad()
def rounded_weights(model: nn.Module, kind: str = "nf4") -> dict[str, Tensor]:
    """Return the dense weights that quantize_model's codes would stand for, by parameter name, for an unmasked model.

    They have the shape and dtype of the parameters. Raises: as quantize_model; model is never changed.
    """
    quantizer(kind).check_library()
    _check_unquantized(model)
    found: dict[str, Tensor] = {}
    for name, (own_name, as_matrix) in _matrix_views(model).items():
        weight = model.get_parameter(own_name).detach()
        found[own_name] = torch.empty_like(weight, memory_format=torch.contiguous_format)
        try:
            as_matrix(found[own_name]).copy_(QuantizedWeight.quantize(as_matrix(weight), kind).dense())
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    return found


def coded_shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Return the shape (N, K) of each matrix that quantize_model would quantise in an unmasked model, by parameter."""
    found = {name: as_matrix(model.get_parameter(name).detach()) for name, as_matrix in _matrix_views(model).values()}
    return {name: (matrix.shape[0], matrix.shape[1]) for name, matrix in found.items()}


def _matrix_views(model: nn.Module) -> dict[str, tuple[str, Callable[[Tensor], Tensor]]]:
    """Return by layer its parameter's name, and a function that views a contiguous one as the matrix to quantise."""
    found: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {}
    for name in _quantizable(model, False):
        own_name = weight_name(model, name)
        if model.get_parameter(own_name).dim() == 3:
            found[name] = own_name, lambda experts: experts.flatten(0, 1)
        elif isinstance(linear_named(model, name), Conv1D):
            found[name] = own_name, Tensor.t
        else:
            found[name] = own_name, lambda weight: weight
    return found


def quantized_product(x: Tensor, quantized: QuantizedWeight, bias: Tensor | None) -> Tensor:
    """Compute ``x @ dense().T + bias`` as QuantizedLinear does."""
    return _QuantizedProduct.apply(x, bias, quantized)


class QuantizedLinear(nn.Module):
    """y = x @ dense().T + bias, in nn.Linear's place, over a frozen weight that is held quantised.

    Neither x nor a dense weight is saved for the backward pass. If a kernel decodes, up to 512 tokens make no dense
    weight; on a CPU the products then equal those of a MaskedLinear that keeps every weight, bit for bit.
    Shapes: x (..., K), in the weight's dtype; weight (N, K), bias (N,).
    """

    def __init__(self, quantized: QuantizedWeight, bias: Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = quantized.shape
        self.quantized = quantized
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    @classmethod
    def from_linear(cls, linear: nn.Linear | Conv1D, kind: str = "nf4") -> "QuantizedLinear":
        """Quantise a linear layer. Shares its bias and keeps its training mode."""
        weight = linear.weight.t() if isinstance(linear, Conv1D) else linear.weight
        return cls(QuantizedWeight.quantize(weight.detach(), kind), linear.bias).train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        return quantized_product(x, self.quantized, self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def can_skip_dense(quantized: QuantizedWeight, x: Tensor, scores: Tensor) -> bool:
    """Return whether masked_product can be used: a kernel decodes, and only autograd has to see the call."""
    return quantized.is_fused(x) and not is_seen_by_others(x, scores, quantized.codes)


def masked_product(
    x: Tensor, quantized: QuantizedWeight, mask: CurrentMask, scores: Tensor, bias: Tensor | None, *, mode: str
) -> Tensor:
    """Compute ``x @ where(mask, dense(), 0).T + bias``. A dense weight is made only for the scores' gradient."""
    if not torch.is_grad_enabled():
        return quantized.masked_linear(x, mask.packed, bias)
    return _QuantizedMaskedProduct.apply(x, scores, bias, quantized, mask, mode)


class QuantizedMaskedLinear(MaskedLinear):
    """A MaskedLinear whose weight is decoded from codes each time that it is read. quantize_model makes it.

    With hold(..., weight=module.quantized), no dense weight is made if a kernel decodes; otherwise it is freed after
    each product. Without hold, if a kernel decodes and only autograd has to see the call, a dense weight is made only
    for the scores' gradient; otherwise the forward pass makes one and autograd keeps it.
    """

    quantized: QuantizedWeight

    @property
    def weight(self) -> Tensor:  # type: ignore[override]  # read-only; MaskedLinear has a parameter
        """Dense weight (N, K), decoded by each access. For its shape or dtype, read ``quantized``."""
        return self.quantized.dense()

    def forward(self, x: Tensor) -> Tensor:
        plain = self._held is None and not x.is_nested
        if not (plain and can_skip_dense(self.quantized, x, self.scores)):
            return super().forward(x)
        try:
            mask = current_mask(self.scores, *self.rule)
        except NonFiniteScores as error:
            raise self._name_error(error) from None
        return masked_product(x, self.quantized, mask, self.scores, self.bias, mode=self.mode)

    def merge(self, *, alpha: float = 1.0) -> nn.Linear:
        raise ValueError(
            f"masks must be merged into exact weights, got {self.module_name or 'a layer'} in {self.quantized.kind}: "
            "save_masks, and load_masks on the unquantised model"
        )


class QuantizedMaskedGroupedLinear(MaskedGroupedLinear):
    """A MaskedGroupedLinear whose weight is decoded from codes, for all experts at once, each time that it is read."""

    quantized: QuantizedWeight  # as a matrix (E * N, K)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]  # as in QuantizedMaskedLinear
        """Dense weight (E, N, K), decoded by each access."""
        return dense_experts(self.quantized, self.experts)

    def hold(self, packed: Tensor, grad_buffer: Tensor | None = None, *, weight: Weight | None = None) -> None:
        if weight is self.quantized:
            weight = functools.partial(dense_experts, self.quantized, self.experts)
        super().hold(packed, grad_buffer, weight=weight)

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        plain = self._held is None and x.dtype == self.quantized.dtype and torch.is_grad_enabled()
        if not plain or is_seen_by_others(x, self.scores, self.quantized.codes, offsets):
            return super().forward(x, offsets)
        try:
            mask = current_mask(self.scores, *self.rule)
        except NonFiniteScores as error:
            raise self._name_error(error) from None
        return _GroupedMaskedProduct.apply(x, self.scores, self.bias, offsets, self, mask)


# ---------------------------------------------------------------------------------------------- private


class _QuantizedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, quantized: QuantizedWeight) -> Tensor:
        ctx.quantized, ctx.x_dtype = quantized, x.dtype
        if _is_fused(x, quantized):
            return quantized.masked_linear(x, None, bias)
        return F.linear(x, quantized.dense(), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        d_x = d_bias = None
        if ctx.needs_input_grad[0]:
            # Under autocast, x and the output may have other dtypes than the weight.
            if _is_fused(grad_output, ctx.quantized):
                d_x = ctx.quantized.masked_d_x(grad_output, None)
            else:
                d_x = grad_output @ ctx.quantized.dense().to(grad_output.dtype)
            d_x = d_x.to(ctx.x_dtype)
        if ctx.needs_input_grad[1]:
            d_bias = grad_output.flatten(0, -2).sum(0)
        return d_x, d_bias, None


# A frozen layer's forward pass with NF4, time relative to torch's product on a weight decoded first. Measured by hand
# on a Xeon with AMX, three shapes; not measured on a GPU.
# 512 tokens: 0.71 to 0.77 in bf16, 0.72 to 1.00 in fp32. 1,024 tokens: 0.90 to 1.55 in bf16, 0.89 to 1.02 in fp32.
_MOST_FUSED_TOKENS = 512


def _is_fused(x: Tensor, quantized: QuantizedWeight) -> bool:
    return x.shape[:-1].numel() <= _MOST_FUSED_TOKENS and quantized.is_fused(x)


class _QuantizedMaskedProduct(torch.autograd.Function):
    """masked_linear_by_ratio over codes. It saves x, and no dense weight."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scores: Tensor,
        bias: Tensor | None,
        quantized: QuantizedWeight,
        mask: CurrentMask,
        mode: str,
    ) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, scores)
        ctx.quantized, ctx.mask, ctx.mode = quantized, mask, mode
        return quantized.masked_linear(x, mask.packed, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x, scores = unchanged(ctx)
        wants_x, wants_scores, wants_bias = ctx.needs_input_grad[:3]
        d_x = d_scores = d_bias = None
        if wants_scores:  # d_scores is as large as a dense weight, so making one here is acceptable
            sign = Tensor.detach(scores) if scores.is_floating_point() else None
            wants = [wants_x, False, True, wants_bias]
            weight, mask = ctx.quantized.dense(), ctx.mask
            d_x, _, d_scores, d_bias = MASKED_LINEAR_PACKED_BACKWARD(
                grad_output, x, weight, mask.packed, sign, mask.signs, ctx.mode, wants, "auto"
            )
        else:
            d_x = ctx.quantized.masked_d_x(grad_output, ctx.mask.packed) if wants_x else None
            d_bias = grad_output.flatten(0, -2).sum(0) if wants_bias else None
        return d_x if wants_x else None, d_scores, d_bias if wants_bias else None, None, None, None


class _GroupedMaskedProduct(torch.autograd.Function):
    """masked_linear_grouped_by_ratio over codes. It saves x, and no dense weight."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scores: Tensor,
        bias: Tensor | None,
        offsets: Tensor,
        layer: QuantizedMaskedGroupedLinear,
        mask: CurrentMask,
    ) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, scores, offsets)
        ctx.layer, ctx.mask = layer, mask
        return GROUPED_PACKED.compute((x, layer.weight, mask.packed, offsets, bias, layer.transposed, "auto"))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        (x, scores, offsets), layer, mask = unchanged(ctx), ctx.layer, ctx.mask
        sign = Tensor.detach(scores) if scores.is_floating_point() else None
        wants_x, wants_scores, wants_bias = ctx.needs_input_grad[:3]
        wants = [wants_x, False, wants_scores, wants_bias]
        x = grad_output if x is None else x
        d_x, _, d_scores, d_bias = GROUPED_PACKED_BACKWARD(
            grad_output,
            x,
            layer.weight,
            mask.packed,
            sign,
            mask.signs,
            offsets,
            layer.transposed,
            layer.mode,
            wants,
            "auto",
        )
        grads = zip((d_x, d_scores, d_bias), (wants_x, wants_scores, wants_bias))
        return *(grad if wanted else None for grad, wanted in grads), None, None, None


def _quantize_masked(module: Any, kind: str) -> None:
    grouped = isinstance(module, MaskedGroupedLinear)
    quantized = (quantize_experts if grouped else QuantizedWeight.quantize)(module.weight.detach(), kind)
    del module.weight
    # The object stays the same, so that references to the module or its scores stay valid.
    module.__class__ = QuantizedMaskedGroupedLinear if grouped else QuantizedMaskedLinear
    module.quantized = quantized


def _quantizable(model: nn.Module, masked: bool) -> list[str]:
    """Return the names of the decoder layers' frozen linears and experts; with ``masked``, of masked layers too."""
    names, trainable = list(masked_modules(model)) if masked else [], 0
    for candidate in find_candidates(model, layer_stacks(model)):
        if isinstance(candidate.module, MaskedLayer) or candidate.layer is None or candidate.is_head:
            continue
        # For experts, only the module's own parameters count: its children may be masked layers with trainable scores.
        parameters = candidate.module.parameters(recurse=not candidate.is_parameter)
        if candidate.obstacle:
            raise ValueError(f"cannot quantise {candidate.name}: {candidate.obstacle}")
        if any(parameter.requires_grad for parameter in parameters):
            trainable += 1
        else:
            names.append(candidate.name)
    if names:
        return names
    if trainable:
        raise ValueError(
            f"model must have frozen linears in its decoder layers to quantise, got {trainable} that are trainable: "
            "mask_model it first, or model.requires_grad_(False)"
        )
    raise ValueError(f"model must have linears in decoder layers to quantise, got {type(model).__name__} without any")


def _check_unquantized(model: nn.Module) -> None:
    found = quantized_weights(model)
    if found:
        name, weight = next(iter(found.items()))
        raise ValueError(
            f"model must not be quantised already, got {len(found)} layers that are ({name} in {weight.kind}, ...): "
            "load it again"
        )
