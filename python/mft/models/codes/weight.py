"""A weight matrix held as codes, of which a kernel decodes parts, or one product the whole (mft_kernels/codes.py)."""

from typing import Any

import torch
from torch import Tensor, nn

from mft.quantizers import quantizer
from mft_kernels import dequantize
from mft_kernels.internal import FORMATS, Codes, QuantizedMatrix, registered

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class QuantizedWeight(nn.Module, QuantizedMatrix):
    """The matrix (N, K) that codes stand for, with a buffer for each tensor of their layout.

    Casting the model changes dtype, that of dense(), but no code. kind: the format's name.
    """

    codes: Tensor
    absmax: Tensor

    def __init__(self, coded: Codes, dtype: torch.dtype) -> None:
        super().__init__()
        self.shape, self.dtype, self._form = torch.Size(coded.shape), dtype, type(coded)
        for name, tensor in zip(("codes", *coded.scale_names), (coded.codes, *coded.scales)):
            self.register_buffer(name, tensor)

    @classmethod
    def empty(
        cls, shape: tuple[int, int], dtype: torch.dtype, kind: str, device: torch.device | str | None = None
    ) -> "QuantizedWeight":
        """Return a matrix of this shape whose tensors are allocated but not written."""
        return cls(FORMATS[kind].empty(shape, device), dtype)

    @classmethod
    @torch.no_grad()
    def quantize(cls, weight: Tensor, kind: str = "nf4") -> "QuantizedWeight":
        """Round each weight to its nearest level, on the weight's device.

        Args: weight: (N, K), fp32, fp16 or bf16, of any strides.
        Raises: ValueError if weight has another form or is not finite; RuntimeError if the NF4 library is missing.
        """
        if weight.dim() != 2 or not weight.numel():
            raise ValueError(f"weight must be a matrix (N, K) that is not empty, got {tuple(weight.shape)}")
        if weight.dtype not in _DTYPES:
            raise ValueError(f"weight must be fp32, fp16 or bf16 to be quantised, got {weight.dtype}")
        return cls(quantizer(kind).encode(weight), weight.dtype)

    @property
    def kind(self) -> str:
        return self._form.name

    def coded(self) -> Codes:
        codes, *scales = self.tensors().values()
        return self._form(codes, scales, self.shape)

    @torch.no_grad()
    def dense(self) -> Tensor:
        """Return (N, K) in dtype, contiguous. Calls decode again, bit-equal. Values are rounded once, from fp32."""
        coded = self.coded()
        if self.codes.device.type == "cpu" and registered("cpu").unavailable is None:
            return dequantize(coded.codes, coded.scales, shape=self.shape, kind=self.kind, dtype=self.dtype)
        return quantizer(self.kind).dense(coded, self.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors that dense() needs on its device. Their .data may be replaced."""
        return {name: getattr(self, name) for name in ("codes", *self._form.scale_names)}

    def extra_repr(self) -> str:
        return f"{self.kind}, {tuple(self.shape)}, {self.dtype}"

    def _apply(self, fn: Any, recurse: bool = True) -> "QuantizedWeight":
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.codes.device)).dtype
        before = self.tensors()
        super()._apply(fn, recurse)
        for name, tensor in before.items():
            found = getattr(self, name)
            if found.dtype != tensor.dtype:
                setattr(self, name, tensor.to(found.device))
        return self


def quantized_weights(model: nn.Module) -> dict[str, QuantizedWeight]:
    """Return the quantised weights by the name of the linear that holds them, in the model's order."""
    found = ((name, getattr(module, "quantized", None)) for name, module in model.named_modules())
    return {name: weight for name, weight in found if isinstance(weight, QuantizedWeight)}
