"""A weight matrix in NF4 or int8, of which the kernels decode parts, or one product has the dense matrix.

    nf4     w[i] = NF4[code[i]] * absmax[i // 64]   QLoRA's sixteen levels (arXiv 2305.14314), blocks along the rows and
                                                    across their ends; two codes a byte: 0.5625 bytes a weight
    nf4-dq  absmax[b] = map[code[b]] * nested[b // 256] + offset    its double quantisation: 0.516 bytes a weight
    int8    w[n, k] = code[n, k] * absmax[n] / 127  1 byte a weight and 4 bytes a row

NF4 is bitsandbytes'. int8 has its layout, but is computed here: on a GPU its kernel takes fp16 weights alone.
"""

import logging
from typing import Any

import torch
from torch import Tensor, nn

from mft.config import QUANTIZATIONS
from mft_kernels import dequantize
from mft_kernels.backends import cpu
from mft_kernels.ops.quantized import QuantizedMatrix

BLOCK = 64  # weights that share an absmax in NF4
_NESTED_BLOCK = 256  # of these that share one in turn
_NESTED = ("nested_absmax", "nested_quant_map", "nested_offset")
_LARGEST_CODE = 127
_QUANTIZED_AT_ONCE = 1 << 20  # weights: bitsandbytes' temporaries take some 20 bytes of each
# Weights whose fp32 temporaries on a CPU, 8 bytes of each, stay in the cache: on a Zen 5 4 times faster than 2^20.
_DEQUANTIZED_AT_ONCE = 1 << 18
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class QuantizedWeight(nn.Module, QuantizedMatrix):
    """The (N, K) matrix that codes and absmax stand for; see the module for the formulas.

    A module, so that a model moves and saves it. Casting the model changes what dense() returns, and no code.

    Attributes:
        kind: "nf4", "nf4-dq" or "int8". shape: (N, K). dtype: of dense(): fp32, fp16 or bf16.
        codes: uint8 (ceil(N * K / 2), 1) for NF4, the first of two in the high bits; int8 (N, K).
        absmax: fp32 (B,), B = ceil(N * K / 64) for NF4, (N,) for int8; of nf4-dq its codes, uint8 (B,).
        nested_absmax, nested_quant_map, nested_offset: of nf4-dq, fp32 (ceil(B / 256),), (256,) and (), as bitsandbytes
            has them in its files; else None.
    """

    codes: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    nested_quant_map: Tensor | None
    nested_offset: Tensor | None

    def __init__(
        self,
        kind: str,
        shape: tuple[int, int],
        dtype: torch.dtype,
        codes: Tensor,
        absmax: Tensor,
        nested: tuple[Tensor, Tensor, Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.kind, self.shape, self.dtype = kind, torch.Size(shape), dtype
        self.register_buffer("codes", codes)
        self.register_buffer("absmax", absmax)
        for name, tensor in zip(_NESTED, nested or (None, None, None)):
            self.register_buffer(name, tensor)

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
        nf4 = kind != "int8"
        codes = torch.empty(
            (-(-numel // 2), 1) if nf4 else (rows, columns), dtype=torch.uint8 if nf4 else torch.int8, device=device
        )
        blocks = -(-numel // BLOCK) if nf4 else rows
        absmax = torch.empty(blocks, dtype=torch.float32, device=device)
        if kind != "nf4-dq":
            return cls(kind, (rows, columns), dtype, codes, absmax)
        nested = absmax.new_empty(-(-blocks // _NESTED_BLOCK)), absmax.new_empty(256), absmax.new_empty(())
        return cls(kind, (rows, columns), dtype, codes, torch.empty_like(absmax, dtype=torch.uint8), nested)

    @classmethod
    @torch.no_grad()
    def quantize(cls, weight: Tensor, kind: str = "nf4") -> "QuantizedWeight":
        """Each weight at the level nearest to it, computed where it lies; some 20 MB of temporaries.

        Args: weight: (N, K), fp32, fp16 or bf16, of any strides.
        Raises: ValueError if weight is of another kind, or not finite; RuntimeError if NF4's library is missing.
        """
        if weight.dim() != 2 or not weight.numel():
            raise ValueError(f"weight must be a matrix (N, K) that is not empty, got {tuple(weight.shape)}")
        check_quantization(kind)
        plain = "nf4" if kind == "nf4-dq" else kind
        self = cls.empty((weight.shape[0], weight.shape[1]), weight.dtype, plain, weight.device)
        # In NF4 a chunk has to end where a block and a byte end: 64 rows do, whatever their length.
        whole = BLOCK if plain == "nf4" else 1
        rows = max(1, _QUANTIZED_AT_ONCE // (whole * weight.shape[1])) * whole
        for start in range(0, weight.shape[0], rows):
            chunk = weight[start : start + rows].contiguous()
            if plain == "nf4":
                codes, absmax = _quantize_nf4(chunk)
                first = start * weight.shape[1]
                self.codes[first // 2 : first // 2 + len(codes)] = codes
                self.absmax[first // BLOCK : first // BLOCK + len(absmax)] = absmax
            else:
                codes, absmax = _quantize_int8(chunk)
                self.codes[start : start + rows], self.absmax[start : start + rows] = codes, absmax
        if not self.absmax.isfinite().all():
            raise ValueError("weight must be finite to be quantised, got NaN or infinite values")
        if kind == plain:
            return self
        absmax, nested = _quantize_absmax(self.absmax)
        return cls(kind, (weight.shape[0], weight.shape[1]), self.dtype, self.codes, absmax, nested)

    @torch.no_grad()
    def dense(self) -> Tensor:
        """(N, K) of dtype, contiguous, made anew by each call and equal to the last bit; rounded once, from fp32."""
        if self.codes.device.type == "cpu" and cpu.unavailable is None:
            return dequantize(self.codes, self.scales(), shape=self.shape, kind=self.levels(), dtype=self.dtype)
        if self.levels() == "nf4":
            return _dequantize_nf4(self)
        dense = torch.empty(self.shape, dtype=self.dtype, device=self.codes.device)
        on_cpu = dense.device.type == "cpu"  # a GPU converts within the product
        rows = max(1, _DEQUANTIZED_AT_ONCE // self.shape[1]) if on_cpu else self.shape[0]
        for part, codes, absmax in zip(dense.split(rows), self.codes.split(rows), self.absmax.split(rows)):
            torch.mul(codes, (absmax / _LARGEST_CODE)[:, None], out=part)
        return dense

    def levels(self) -> str:
        """What the kernels call the kind: whether absmax is quantised too they see by scales()."""
        return "int8" if self.kind == "int8" else "nf4"

    def scales(self) -> list[Tensor]:
        """absmax, or with double quantisation all four, as the kernels take it."""
        return [tensor for name, tensor in self.tensors().items() if name != "codes"]

    @property
    def nbytes(self) -> int:
        """Of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """All that has to be on a device for dense() to work there; their .data may be exchanged."""
        nested = {name: getattr(self, name) for name in _NESTED} if self.kind == "nf4-dq" else {}
        return {"codes": self.codes, "absmax": self.absmax, **nested}

    def extra_repr(self) -> str:
        return f"{self.kind}, {tuple(self.shape)}, {self.dtype}"

    def _apply(self, fn: Any, recurse: bool = True) -> "QuantizedWeight":
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.absmax.device)).dtype
        before = self.tensors()
        super()._apply(fn, recurse)
        for name, tensor in before.items():
            found = getattr(self, name)
            if found.dtype != tensor.dtype:
                setattr(self, name, tensor.to(found.device))
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
    if kind in ("nf4", "nf4-dq"):
        _bitsandbytes()


# ---------------------------------------------------------------------------------------------- private


def _quantize_nf4(weight: Tensor) -> tuple[Tensor, Tensor]:
    codes, state = _bitsandbytes().quantize_4bit(weight, quant_type="nf4", blocksize=BLOCK)
    return codes, state.absmax


def _quantize_absmax(absmax: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """(codes, what they stand for), as quantize_4bit(compress_statistics=True) makes them of the whole matrix."""
    offset = absmax.mean()
    codes, state = _bitsandbytes().quantize_blockwise(absmax - offset, blocksize=_NESTED_BLOCK)
    return codes, (state.absmax, state.code, offset)


def _dequantize_nf4(weight: QuantizedWeight) -> Tensor:
    # As one row of an even length: what the CPU kernel takes, and all of what the codes hold.
    functional = _bitsandbytes()
    nested = {}
    if weight.kind == "nf4-dq":
        state2 = functional.QuantState(
            absmax=weight.nested_absmax,
            code=weight.nested_quant_map,
            blocksize=_NESTED_BLOCK,
            dtype=torch.float32,
        )
        nested = {"offset": weight.nested_offset, "state2": state2}
    state = functional.QuantState(
        **nested,
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
