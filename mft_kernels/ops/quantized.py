"""The masked product over a quantised weight, which is decoded where the mask is applied and never stored whole.

A product reads 0.5625 bytes per weight in NF4 (0.516 with double quantisation), 0.625 in int4 and 1 in int8, plus 1 bit
of the mask. pack_mask makes the bits from scores. dequantize makes the dense matrix.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ..backends.table import asked_for, choose, registered
from ..codes import FORMATS, Codes
from ..operands import Keep, as_rows
from . import served
from .checks import check_bias, check_device, check_floating, check_packed, check_shape, check_tensor
from .linear import MASKED_LINEAR_PACKED_BACKWARD, masked_linear_packed
from .route import Gradient, Op, unchanged


class QuantizedMatrix:
    """A mixin for objects that hold a weight as codes. hold() takes an instance in place of a weight.

    If the cpu, triton or cuda backend serves a product, it makes no dense matrix. Otherwise dense() makes one.

    Attributes: dtype: the dtype of dense().
    """

    dtype: torch.dtype

    def coded(self) -> Codes:
        """Return the codes and scales, of a class of FORMATS."""
        raise NotImplementedError

    def dense(self) -> Tensor:
        """Return a new dense tensor (N, K) of dtype."""
        raise NotImplementedError

    def is_fused(self, x: Tensor) -> bool:
        """Return whether a product with x, which may be a gradient, is made without a dense matrix."""
        if isinstance(x, FakeTensor) and not torch.compiler.is_compiling():
            return False  # simulated: a fake "cpu" stands for any device, and other devices make the dense matrix
        return x.dtype == self.dtype and _decodes(self.coded())

    def masked_linear(self, x: Tensor, packed: Tensor | None, bias: Tensor | None) -> Tensor:
        """Compute x @ where(mask, dense(), 0).T + bias. packed None, which keeps all, needs is_fused."""
        if packed is not None and not self.is_fused(x):
            return masked_linear_packed(x, self.dense(), packed, bias)
        coded = self.coded()
        return _QUANTIZED(x, coded.codes, coded.scales, packed, bias, coded.shape, coded.name, "auto")

    def masked_d_x(self, grad_output: Tensor, packed: Tensor | None) -> Tensor:
        """Compute grad_output @ where(mask, dense(), 0). packed None, which keeps all, needs is_fused."""
        if packed is not None and not self.is_fused(grad_output):
            wants = [True, False, False, False]
            dense = self.dense()
            return MASKED_LINEAR_PACKED_BACKWARD(
                grad_output, grad_output, dense, packed, None, None, "value", wants, "auto"
            )[0]
        coded = self.coded()
        return _QUANTIZED_D_X(
            grad_output, coded.codes, list(coded.scales), packed, list(coded.shape), coded.name, "auto"
        )


def _decodes(coded: Codes) -> bool:
    """Return whether one of our kernels decodes this format on its device.

    On a GPU that is a triton kernel. With MFT_KERNELS=cuda none does: that backend takes dense weights.
    """
    name, device_type = "cpu", coded.codes.device.type
    if device_type == "cuda":
        name = "cuda" if asked_for() == "cuda" else "triton"
    found = registered(name)
    return device_type in found.device_types and found.takes_operand(type(coded))


def masked_linear_quantized(
    x: Tensor,
    codes: Tensor,
    absmax: Tensor | Sequence[Tensor],
    packed: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    shape: tuple[int, int] | torch.Size,
    kind: str = "nf4",
    backend: str = "auto",
) -> Tensor:
    """Compute ``y = x @ where(mask, w, 0).T + bias`` with w decoded from codes.

    On a CPU and by GPU kernels, w is never stored as a dense matrix.

    The class of the kind in codes.py says how w is decoded, in fp32; it is then rounded once to x's dtype. On a CPU the
    result equals that of masked_linear_packed on the matrix of dequantize, bit for bit. x and bias get gradients.

    Args:
        x: (..., K), floating.
        codes: as the layout of the class says; two codes per byte may have any shape.
        absmax: the scale, or a list of all scales of the layout. nf4 also takes the four of nf4-dq.
        packed: int32 (N, ceil(K / 32)), see pack_mask; None keeps all.
        bias: (N,), dtype of x.
        shape: (N, K).
        kind: a key of FORMATS in codes.py.
    Returns: (..., N) in x's dtype; accumulated in fp32.
    Raises: ValueError for shapes, devices or kind, TypeError for dtypes, RuntimeError for a backend that cannot serve.
    """
    return _QUANTIZED(x, codes, absmax, packed, bias, shape, kind, backend)


def dequantize(
    codes: Tensor,
    absmax: Tensor | Sequence[Tensor],
    *,
    shape: tuple[int, int] | torch.Size,
    kind: str = "nf4",
    dtype: torch.dtype = torch.float32,
    backend: str = "auto",
) -> Tensor:
    """Return the dense matrix (N, K) of ``dtype`` that codes and absmax hold; see masked_linear_quantized."""
    absmax = _check_codes(codes, absmax, shape, kind)
    if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype must be a floating torch.dtype, got {dtype!r}")
    return _DEQUANTIZE(codes, absmax, list(shape), kind, dtype, backend)


def _check_codes(codes, absmax, shape, kind) -> list[Tensor]:
    if kind not in FORMATS:
        raise ValueError(f"kind must be one of {tuple(FORMATS)}, got {kind!r}")
    check_shape(shape)
    check_tensor("codes", codes)
    if not isinstance(absmax, Tensor | Sequence):
        raise TypeError(f"absmax must be a tensor, or a list of all scales, got {type(absmax).__name__}")
    scales = [absmax] if isinstance(absmax, Tensor) else list(absmax)
    form = FORMATS[kind].with_scales(len(scales))
    (needed, dtype), *expected = form.layout(shape).values()
    if codes.dtype != dtype:
        raise TypeError(f"codes must be {dtype} for {kind}, got {codes.dtype}")
    if codes.numel() != math.prod(needed) if form.packs else tuple(codes.shape) != needed:
        words = f"{math.prod(needed)} bytes" if form.packs else needed
        raise ValueError(f"codes must be {words} for {kind} of {tuple(shape)}, got {tuple(codes.shape)}")
    for i, (scale, (size, dtype)) in enumerate(zip(scales, expected)):
        name = f"absmax[{i}]" if len(scales) > 1 else "absmax"
        check_tensor(name, scale)
        if scale.dtype != dtype:
            others = (other for other in FORMATS.values() if issubclass(other, form) and other is not form)
            fits = [other for other in others if other.scale_layout(shape)[0][1] == scale.dtype]
            advice = "".join(f": give all {len(other.scale_names)} scales of {other.name}" for other in fits)
            raise TypeError(f"{name} must be {dtype} for {form.name}, got {scale.dtype}{advice}")
        if tuple(scale.shape) != size:
            raise ValueError(f"{name} must be {size} for {kind} of {tuple(shape)}, got {tuple(scale.shape)}")
        check_device(name, scale, "codes", codes)
    return scales


# ---------------------------------------------------------------------------------------------- the ops' definitions


def _check(call: Any) -> Any:
    x, codes, packed, shape = call.x, call.codes, call.packed, call.shape
    absmax = _check_codes(codes, call.absmax, shape, call.kind)
    check_tensor("x", x)
    check_floating("x", x)
    check_device("x", x, "codes", codes)
    if x.dim() == 0 or x.shape[-1] != shape[1]:
        raise ValueError(f"x must end in in_features = {shape[1]}, got shape {tuple(x.shape)}")
    if packed is not None:
        check_packed("packed", packed, shape)
        check_device("packed", packed, "codes", codes)
    check_bias(call.bias, x, (shape[0],))
    return call._replace(absmax=absmax, shape=list(shape))


def _weight(call: Any) -> Codes:
    return FORMATS[call.kind].with_scales(len(call.absmax))(call.codes, call.absmax, call.shape)


def _keep(call: Any) -> Keep | None:
    return None if call.packed is None else Keep(call.packed)


def _decoded(call: Any) -> Tensor:
    weight, device = _weight(call), call.codes.device
    run = choose("decode", device, (call.dtype,), call.backend, op="dequantize", operands=frozenset({type(weight)}))
    return run(weight, call.dtype)


class _ToTokensAndBias(Gradient):
    def save(self, ctx: Any, call: Any) -> None:
        ctx.settings = call.shape, call.kind, call.backend
        ctx.save_for_backward(call.codes, call.packed, *call.absmax)

    def backward(self, ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
        codes, packed, *absmax = unchanged(ctx)
        d_x = d_bias = None
        if ctx.needs_input_grad[0]:
            d_x = _QUANTIZED_D_X(grad_output, codes, absmax, packed, *ctx.settings)
        if ctx.needs_input_grad[4]:
            d_bias = as_rows(grad_output).sum(0)
        return d_x, None, [None] * len(absmax), None, d_bias, None, None, None


_DEQUANTIZE = Op("dequantize", _decoded)
_QUANTIZED_D_X = Op(
    "masked_linear_quantized_d_x", lambda call: served.d_x(call, _weight(call), _keep(call)), is_gradient=True
)
_QUANTIZED = Op(
    "masked_linear_quantized",
    lambda call: served.product(call, _weight(call), _keep(call)),
    check=_check,
    gradient=_ToTokensAndBias(),
)
