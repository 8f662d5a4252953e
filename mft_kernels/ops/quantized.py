"""The masked product over a quantised weight, which is decoded where the mask is applied and never stored whole.

A product reads 0.5625 bytes per weight in NF4 (0.516 with double quantisation), 0.625 in int4 and 1 in int8, plus 1 bit
of the mask. pack_mask makes the bits from scores. dequantize makes the dense matrix.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ..backends.table import asked_for, choose, registered
from ..codes import FORMATS, Codes
from ..operands import Keep
from . import served
from .checks import autocasts, check_device, check_floating, check_packed, check_shape, check_tensor
from .linear import GRADIENTS_OF_PACKED, masked_linear_packed
from .route import Gradient, Op, unchanged


class QuantizedMatrix:
    """A mixin for objects that hold a weight as codes. hold() takes an instance in place of a weight.

    If the cpu, triton or cuda backend serves a product, it makes no dense matrix. Otherwise dense() makes one.

    Attributes: shape: (N, K). dtype: the dtype of dense(). codes: see masked_linear_quantized.
    """

    shape: torch.Size
    dtype: torch.dtype
    codes: Tensor

    def levels(self) -> str:
        """Return the kind, a key of FORMATS; see masked_linear_quantized."""
        raise NotImplementedError

    def scales(self) -> list[Tensor]:
        """Return absmax, or the four tensors of double quantisation; see masked_linear_quantized."""
        raise NotImplementedError

    def dense(self) -> Tensor:
        """Return a new dense tensor (N, K) of dtype."""
        raise NotImplementedError

    def is_fused(self, x: Tensor) -> bool:
        """Return whether a product with x, which may be a gradient, is made without a dense matrix."""
        if isinstance(x, FakeTensor) and not torch.compiler.is_compiling():
            return False  # simulated: a fake "cpu" stands for any device, and other devices make the dense matrix
        return x.dtype == self.dtype and _decodes(FORMATS[self.levels()], self.codes.device.type)

    def masked_linear(self, x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
        """Compute x @ where(mask, dense(), 0).T + bias."""
        if not self.is_fused(x):
            return masked_linear_packed(x, self.dense(), packed, bias)
        return masked_linear_quantized(x, self.codes, self.scales(), packed, bias, shape=self.shape, kind=self.levels())

    def masked_d_x(self, grad_output: Tensor, packed: Tensor) -> Tensor:
        """Compute grad_output @ where(mask, dense(), 0)."""
        if not self.is_fused(grad_output):
            wants = [True, False, False, False]
            dense = self.dense()
            return GRADIENTS_OF_PACKED(grad_output, grad_output, dense, packed, None, None, "value", wants, "auto")[0]
        return masked_linear_quantized_d_x(
            grad_output, self.codes, self.scales(), packed, shape=self.shape, kind=self.levels()
        )


def _decodes(form: type[Codes], device_type: str) -> bool:
    """Return whether one of our kernels decodes this format on this device type.

    On a GPU that is a triton kernel. With MFT_KERNELS=cuda none does: that backend takes dense weights.
    """
    name = "cpu"
    if device_type == "cuda":
        name = "cuda" if asked_for() == "cuda" else "triton"
    found = registered(name)
    return device_type in found.device_types and found.takes_operand(form)


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

    nf4: w[i] = NF4[code[i]] * absmax[i // 64], i over the whole matrix. int4: w[i] = (code[i] - 8) * absmax[i // 32].
    int8: w[n, k] = code[n, k] * (absmax[n] / 127).
    w is decoded in fp32 and rounded once to x's dtype, as in bitsandbytes. On a CPU the result equals that of
    masked_linear_packed on the matrix of dequantize, bit for bit. x and bias get gradients.

    Args:
        x: (..., K), floating.
        codes: for nf4 and int4, ceil(N * K / 2) bytes of uint8, two codes per byte, the first in the high bits. For
            int8, int8 (N, K).
        absmax: fp32 (B,), with B = ceil(N * K / 64) for nf4, ceil(N * K / 32) for int4 and N for int8. For
            bitsandbytes' double quantisation of nf4, four tensors: the codes of absmax, uint8 (B,); the nested absmax,
            fp32 (ceil(B / 256),); the map of codes, fp32 (256,); and the offset, fp32 ().
        packed: int32 (N, ceil(K / 32)), see pack_mask; None keeps all.
        bias: (N,), dtype of x.
        shape: (N, K).
        kind: "nf4", "int8" or "int4".
    Returns: (..., N) in x's dtype; accumulated in fp32.
    Raises: ValueError for shapes, devices or kind, TypeError for dtypes, RuntimeError for a backend that cannot serve.
    """
    return _QUANTIZED(x, codes, absmax, packed, bias, shape, kind, backend)


def masked_linear_quantized_d_x(
    grad_output: Tensor,
    codes: Tensor,
    absmax: list[Tensor],
    packed: Tensor | None = None,
    *,
    shape: tuple[int, int] | torch.Size,
    kind: str = "nf4",
    backend: str = "auto",
) -> Tensor:
    """Compute ``d_x = grad_output @ where(mask, w, 0)``, (..., K), for the backward pass of masked_linear_quantized.

    Arguments are not checked.
    """
    return _QUANTIZED_D_X(grad_output, codes, absmax, packed, list(shape), kind, backend)


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
    form = FORMATS[kind]
    if codes.dtype != form.code_dtype:
        raise TypeError(f"codes must be {form.code_dtype} for {kind}, got {codes.dtype}")
    needed = form.code_shape(shape)
    if (tuple(codes.shape) != needed) if len(needed) > 1 else (codes.numel() != needed[0]):
        expected = needed if len(needed) > 1 else f"{needed[0]} bytes"
        raise ValueError(f"codes must be {expected} for {kind} of {tuple(shape)}, got {tuple(codes.shape)}")
    if not isinstance(absmax, Tensor | Sequence):
        raise TypeError(f"absmax must be a tensor, or four for double quantisation, got {type(absmax).__name__}")
    scales = [absmax] if isinstance(absmax, Tensor) else list(absmax)
    for scale, (name, size, dtype) in zip(scales, form.scales_expected(shape, len(scales))):
        check_tensor(name, scale)
        if scale.dtype != dtype:
            is_half_given = form.has_coded_scales and scale.dtype == torch.uint8
            advice = ": give all four tensors of double quantisation" if is_half_given else ""
            raise TypeError(f"{name} must be {dtype}, got {scale.dtype}{advice}")
        if tuple(scale.shape) != size:
            raise ValueError(f"{name} must be {size} for {kind} of {tuple(shape)}, got {tuple(scale.shape)}")
        check_device(name, scale, "codes", codes)
    return scales


def _check_tokens(name: str, x: Tensor, codes: Tensor, columns: int) -> None:
    check_tensor(name, x)
    check_floating(name, x)
    check_device(name, x, "codes", codes)
    if x.dim() == 0 or x.shape[-1] != columns:
        raise ValueError(f"{name} must end in in_features = {columns}, got shape {tuple(x.shape)}")


# ---------------------------------------------------------------------------------------------- the ops' definitions


def _check(call: Any) -> Any:
    x, codes, packed, bias, shape = call.x, call.codes, call.packed, call.bias, call.shape
    absmax = _check_codes(codes, call.absmax, shape, call.kind)
    _check_tokens("x", x, codes, shape[1])
    if packed is not None:
        check_packed("packed", packed, shape)
        check_device("packed", packed, "codes", codes)
    if bias is not None:
        check_tensor("bias", bias)
        if bias.shape != (shape[0],):
            raise ValueError(f"bias must be ({shape[0]},), got {tuple(bias.shape)}")
        check_device("bias", bias, "codes", codes)
        if bias.dtype != x.dtype and not autocasts(x):
            raise TypeError(f"bias must have x's dtype {x.dtype}, got {bias.dtype}")
    return call._replace(absmax=absmax, shape=list(shape))


def _weight(call: Any) -> Codes:
    return FORMATS[call.kind](call.codes, call.absmax, call.shape)


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
            d_bias = grad_output.reshape(grad_output.shape[:-1].numel(), grad_output.shape[-1]).sum(0)
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
