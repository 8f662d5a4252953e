"""A weight matrix in NF4 or int8, and the dense matrix that is made of it for one product.

    nf4   w[i] = NF4[code[i]] * absmax[i // 64]    QLoRA's sixteen levels (arXiv 2305.14314), blocks along the rows and
                                                   across their ends; two codes a byte: 0.5625 bytes a weight
    int8  w[n, k] = code[n, k] * absmax[n] / 127   1 byte a weight and 4 bytes a row

NF4 is bitsandbytes'. int8 has its layout, but is computed here: on a GPU its kernel takes fp16 weights alone.
"""

import logging
from typing import Any

import torch
from torch import Tensor, nn

from mft.config import QUANTIZATIONS

BLOCK = 64  # weights that share an absmax in NF4
_LARGEST_CODE = 127
_QUANTIZED_AT_ONCE = 1 << 20  # weights: bitsandbytes' temporaries take some 20 bytes of each
# Weights whose fp32 temporaries on a CPU, 8 bytes of each, stay in the cache: on a Zen 5 4 times faster than 2^20.
_DEQUANTIZED_AT_ONCE = 1 << 18
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class QuantizedWeight(nn.Module):
    """The (N, K) matrix that codes and absmax stand for; see the module for the formulas.

    A module, so that a model moves and saves it. Casting the model changes what dense() returns, and no code.

    Attributes:
        kind: "nf4" or "int8". shape: (N, K). dtype: of dense(): fp32, fp16 or bf16.
        codes: uint8 (ceil(N * K / 2), 1) for NF4, the first of two in the high bits; int8 (N, K).
        absmax: fp32 (ceil(N * K / 64),) for NF4, (N,) for int8.
    """

    codes: Tensor
    absmax: Tensor

    def __init__(self, kind: str, shape: tuple[int, int], dtype: torch.dtype, codes: Tensor, absmax: Tensor) -> None:
        super().__init__()
        self.kind, self.shape, self.dtype = kind, torch.Size(shape), dtype
        self.register_buffer("codes", codes)
        self.register_buffer("absmax", absmax)

    @classmethod
    def empty(
        cls, shape: tuple[int, int], dtype: torch.dtype, kind: str, device: torch.device | str | None = None
    ) -> "QuantizedWeight":
        """Memory for a matrix of this shape, not yet written."""
        check_quantization(kind)
        if dtype not in _DTYPES:
            raise ValueError(f"weight must be fp32, fp16 or bf16 to be quantised, got {dtype}")
        rows, columns = shape
        numel = rows * columns
        nf4 = kind == "nf4"
        codes = torch.empty(
            (-(-numel // 2), 1) if nf4 else (rows, columns), dtype=torch.uint8 if nf4 else torch.int8, device=device
        )
        absmax = torch.empty(-(-numel // BLOCK) if nf4 else rows, dtype=torch.float32, device=device)
        return cls(kind, (rows, columns), dtype, codes, absmax)

    @classmethod
    @torch.no_grad()
    def quantize(cls, weight: Tensor, kind: str = "nf4") -> "QuantizedWeight":
        """Each weight at the level nearest to it, computed where it lies; some 20 MB of temporaries.

        Args: weight: (N, K), fp32, fp16 or bf16, of any strides.
        Raises: ValueError if weight is of another kind, or not finite; RuntimeError if NF4's library is missing.
        """
        if weight.dim() != 2 or not weight.numel():
            raise ValueError(f"weight must be a matrix (N, K) that is not empty, got {tuple(weight.shape)}")
        self = cls.empty((weight.shape[0], weight.shape[1]), weight.dtype, kind, weight.device)
        # In NF4 a chunk has to end where a block and a byte end: 64 rows do, whatever their length.
        whole = BLOCK if kind == "nf4" else 1
        rows = max(1, _QUANTIZED_AT_ONCE // (whole * weight.shape[1])) * whole
        for start in range(0, weight.shape[0], rows):
            chunk = weight[start : start + rows].contiguous()
            if kind == "nf4":
                codes, absmax = _quantize_nf4(chunk)
                first = start * weight.shape[1]
                self.codes[first // 2 : first // 2 + len(codes)] = codes
                self.absmax[first // BLOCK : first // BLOCK + len(absmax)] = absmax
            else:
                codes, absmax = _quantize_int8(chunk)
                self.codes[start : start + rows], self.absmax[start : start + rows] = codes, absmax
        if not self.absmax.isfinite().all():
            raise ValueError("weight must be finite to be quantised, got NaN or infinite values")
        return self

    @torch.no_grad()
    def dense(self) -> Tensor:
        """(N, K) of dtype, contiguous, made anew by each call and equal to the last bit; rounded once, from fp32."""
        if self.kind == "nf4":
            return _dequantize_nf4(self)
        dense = torch.empty(self.shape, dtype=self.dtype, device=self.codes.device)
        on_cpu = dense.device.type == "cpu"  # a GPU converts within the product
        rows = max(1, _DEQUANTIZED_AT_ONCE // self.shape[1]) if on_cpu else self.shape[0]
        for part, codes, absmax in zip(dense.split(rows), self.codes.split(rows), self.absmax.split(rows)):
            torch.mul(codes, (absmax / _LARGEST_CODE)[:, None], out=part)
        return dense

    @property
    def nbytes(self) -> int:
        """Of codes and absmax."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """All that has to be on a device for dense() to work there; their .data may be exchanged."""
        return {"codes": self.codes, "absmax": self.absmax}

    def extra_repr(self) -> str:
        return f"{self.kind}, {tuple(self.shape)}, {self.dtype}"

    def _apply(self, fn: Any, recurse: bool = True) -> "QuantizedWeight":
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.absmax.device)).dtype
        absmax = self.absmax
        super()._apply(fn, recurse)
        if self.absmax.dtype != absmax.dtype:
            self.absmax = absmax.to(self.absmax.device)
        return self


def quantized_weights(model: nn.Module) -> dict[str, QuantizedWeight]:
    """The weights that are held quantised by the name of the linear that holds them, in the model's order."""
    found = ((name, getattr(module, "quantized", None)) for name, module in model.named_modules())
    return {name: weight for name, weight in found if isinstance(weight, QuantizedWeight)}


def check_quantization(kind: str) -> None:
    """Raise ValueError unless kind is one of QUANTIZATIONS."""
    if kind not in QUANTIZATIONS:
        raise ValueError(f"kind must be one of {', '.join(QUANTIZATIONS)}, got {kind!r}")


def check_library(kind: str) -> None:
    """Raise RuntimeError if what kind needs is not installed."""
    if kind == "nf4":
        _bitsandbytes()


# ---------------------------------------------------------------------------------------------- private


def _quantize_nf4(weight: Tensor) -> tuple[Tensor, Tensor]:
    codes, state = _bitsandbytes().quantize_4bit(weight, quant_type="nf4", blocksize=BLOCK)
    return codes, state.absmax


def _dequantize_nf4(weight: QuantizedWeight) -> Tensor:
    # As one row of an even length: what the CPU kernel takes, and all of what the codes hold.
    functional = _bitsandbytes()
    state = functional.QuantState(
        absmax=weight.absmax,
        shape=torch.Size((1, 2 * len(weight.codes))),
        dtype=weight.dtype,
        blocksize=BLOCK,
        quant_type="nf4",
    )
    return functional.dequantize_4bit(weight.codes, state).view(-1)[: weight.shape.numel()].view(weight.shape)


def _quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    absmax = weight.abs().amax(1).float()
    # Divided first: 127 / absmax overflows where absmax is denormal. A row of zeros stays one.
    share = weight.float() / absmax.masked_fill(absmax == 0, 1)[:, None]
    return share.mul_(_LARGEST_CODE).round_().nan_to_num_(0, 0, 0).to(torch.int8), absmax


_functional: Any = None  # bitsandbytes.functional once imported; torch.compile would trace what a functools.cache holds


def _bitsandbytes() -> Any:
    global _functional
    if _functional is not None:
        return _functional
    # On import it advises to install a GEMM from the hub, which is not used here.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        from bitsandbytes import functional as _functional
    except ImportError as error:
        raise RuntimeError(
            f'quantization nf4 needs bitsandbytes, which cannot be imported ({error}): pip install "bitsandbytes>=0.50"'
            ", or choose int8, which needs nothing"
        ) from error
    return _functional
