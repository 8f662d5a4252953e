"""A weight matrix in NF4 or int8, of which the kernels decode parts, or one product has the dense matrix.

    nf4     w[i] = NF4[code[i]] * absmax[i // 64]   QLoRA's sixteen levels (arXiv 2305.14314), blocks along the rows and
                                                    across their ends; two codes a byte: 0.5625 bytes a weight
    nf4-dq  absmax[b] = map[code[b]] * nested[b // 256] + offset    its double quantisation: 0.516 bytes a weight
    int8    w[n, k] = code[n, k] * absmax[n] / 127  1 byte a weight and 4 bytes a row

A class each; _FORMATS finds them by name. NF4 is bitsandbytes'. int8 has its layout, but is computed here: on a GPU its
kernel takes fp16 weights alone.
"""

import logging
from collections.abc import Iterator
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from mft_kernels import dequantize
from mft_kernels.backends import cpu
from mft_kernels.ops.quantized import QuantizedMatrix

BLOCK = 64  # weights that share an absmax in NF4
NESTED_BLOCK = 256  # of these that share one in turn
_LARGEST_CODE = 127
_QUANTIZED_AT_ONCE = 1 << 20  # weights: bitsandbytes' temporaries take some 20 bytes of each
# Weights whose fp32 temporaries on a CPU, 8 bytes of each, stay in the cache: on a Zen 5 4 times faster than 2^20.
_DEQUANTIZED_AT_ONCE = 1 << 18
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]  # a tensor's shape and dtype by its name, in files too


class QuantizedWeight(nn.Module, QuantizedMatrix):
    """The (N, K) matrix that codes and absmax stand for; see the module for the formulas.

    A module, so that a model moves and saves it. Casting the model changes what dense() returns, and no code.

    Attributes: shape: (N, K). dtype: of dense(): fp32, fp16 or bf16; and a tensor for each name of the class's layout.
    """

    kind: ClassVar[str]
    codes: Tensor
    absmax: Tensor

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self.shape, self.dtype, self._names = torch.Size(shape), dtype, tuple(tensors)
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)

    @staticmethod
    def empty(
        shape: tuple[int, int], dtype: torch.dtype, kind: str, device: torch.device | str | None = None
    ) -> "QuantizedWeight":
        """Memory for a matrix of this shape, not yet written."""
        return _format(kind).of_shape(shape, dtype, device)

    @staticmethod
    @torch.no_grad()
    def quantize(weight: Tensor, kind: str = "nf4") -> "QuantizedWeight":
        """Each weight at the level nearest to it, computed where it lies; some 20 MB of temporaries.

        Args: weight: (N, K), fp32, fp16 or bf16, of any strides.
        Raises: ValueError if weight is of another kind, or not finite; RuntimeError if NF4's library is missing.
        """
        if weight.dim() != 2 or not weight.numel():
            raise ValueError(f"weight must be a matrix (N, K) that is not empty, got {tuple(weight.shape)}")
        return _format(kind).encode(weight)

    @torch.no_grad()
    def dense(self) -> Tensor:
        """(N, K) of dtype, contiguous, made anew by each call and equal to the last bit; rounded once, from fp32."""
        if self.codes.device.type == "cpu" and cpu.unavailable is None:
            return dequantize(self.codes, self.scales(), shape=self.shape, kind=self.levels(), dtype=self.dtype)
        return self.decode()

    def scales(self) -> list[Tensor]:
        """All tensors but codes, as the kernels take them."""
        return [tensor for name, tensor in self.tensors().items() if name != "codes"]

    @property
    def nbytes(self) -> int:
        """Of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """All that has to be on a device for dense() to work there; their .data may be exchanged."""
        return {name: getattr(self, name) for name in self._names}

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

    @torch.no_grad()
    def dropped(self, keep: Tensor) -> tuple[Tensor, Tensor]:
        """The codes with the level 0 where ``keep`` is False, and the codes that were there, in order.

        Args: keep: Boolean, (N, K).
        Returns: New codes, which decode to the masked weight to the bit, and what put_back takes.
        """
        single = self.single_codes()
        return self.packed_codes(torch.where(keep.flatten(), single, self.zero_code)), single[~keep.flatten()]

    @torch.no_grad()
    def put_back(self, keep: Tensor, taken: Tensor) -> Tensor:
        """The codes before dropped(keep) took these out."""
        return self.packed_codes(self.single_codes().masked_scatter(~keep.flatten(), taken))

    # What a format says:

    zero_code: ClassVar[int]

    def single_codes(self) -> Tensor:
        """(N * K,): one code per element."""
        raise NotImplementedError

    def packed_codes(self, single: Tensor) -> Tensor:
        """The same codes as ``codes`` holds them."""
        raise NotImplementedError

    @staticmethod
    def check_library() -> None:
        """Raise RuntimeError if what it needs is not installed."""

    @staticmethod
    def layout(rows: int, columns: int) -> Layout:
        """Of a matrix of this shape: codes, absmax and what else there is."""
        raise NotImplementedError

    @classmethod
    def encode(cls, weight: Tensor) -> Self:
        """What quantize returns."""
        raise NotImplementedError

    def decode(self) -> Tensor:
        """What dense() returns, where no kernel of ours makes it."""
        raise NotImplementedError

    @classmethod
    def of_shape(cls, shape: tuple[int, int], dtype: torch.dtype, device: torch.device | str | None) -> Self:
        """What empty returns."""
        if dtype not in _DTYPES:
            raise ValueError(f"weight must be fp32, fp16 or bf16 to be quantised, got {dtype}")
        layout = cls.layout(*shape).items()
        return cls(shape, dtype, {name: torch.empty(of, dtype=kind, device=device) for name, (of, kind) in layout})


class Nf4Weight(QuantizedWeight):
    """codes: the first of two in the high bits. absmax: of each block of 64 weights."""

    kind = "nf4"
    zero_code = 7  # of the 16 levels

    def levels(self) -> str:
        return "nf4"

    def single_codes(self) -> Tensor:
        codes = self.codes.flatten()
        return torch.stack((codes >> 4, codes & 15), 1).flatten()[: self.shape.numel()]

    def packed_codes(self, single: Tensor) -> Tensor:
        behind_the_last = self.codes.flatten()[-1:] & 15  # where their number is odd
        pairs = torch.cat((single, behind_the_last[: len(single) % 2])).view(-1, 2)
        return (pairs[:, 0] << 4 | pairs[:, 1]).view(self.codes.shape)

    @staticmethod
    def check_library() -> None:
        _bitsandbytes()

    @staticmethod
    def layout(rows: int, columns: int) -> Layout:
        numel = rows * columns
        return {"codes": ((-(-numel // 2), 1), torch.uint8), "absmax": ((-(-numel // BLOCK),), torch.float32)}

    @classmethod
    def encode(cls, weight: Tensor) -> Self:
        self = cls.of_shape((weight.shape[0], weight.shape[1]), weight.dtype, weight.device)
        # A chunk has to end where a block and a byte end: 64 rows do, whatever their length.
        for start, chunk in _chunks(weight, BLOCK):
            codes, state = _bitsandbytes().quantize_4bit(chunk, quant_type="nf4", blocksize=BLOCK)
            first = start * weight.shape[1]
            self.codes[first // 2 : first // 2 + len(codes)] = codes
            self.absmax[first // BLOCK : first // BLOCK + len(state.absmax)] = state.absmax
        _check_finite(self.absmax)
        return self

    def decode(self) -> Tensor:
        # As one row of an even length: what the CPU kernel takes, and all of what the codes hold.
        functional = _bitsandbytes()
        state = functional.QuantState(
            **self._nested(),
            absmax=self.absmax,
            shape=torch.Size((1, 2 * len(self.codes))),
            dtype=self.dtype,
            blocksize=BLOCK,
            quant_type="nf4",
        )
        return functional.dequantize_4bit(self.codes, state).view(-1)[: self.shape.numel()].view(self.shape)

    def _nested(self) -> dict[str, Any]:
        """What bitsandbytes' description of the codes says of a quantised absmax."""
        return {}


class Nf4DqWeight(Nf4Weight):
    """As Nf4Weight, but absmax is quantised in turn, and the three nested tensors are named as in bitsandbytes' files.

    absmax: codes. nested_absmax: of each block of 256 of them. nested_quant_map: what a code stands for.
    """

    kind = "nf4-dq"
    nested_absmax: Tensor
    nested_quant_map: Tensor
    nested_offset: Tensor

    @staticmethod
    def layout(rows: int, columns: int) -> Layout:
        plain = Nf4Weight.layout(rows, columns)
        (blocks,), _ = plain["absmax"]
        return plain | {
            "absmax": ((blocks,), torch.uint8),
            "nested_absmax": ((-(-blocks // NESTED_BLOCK),), torch.float32),
            "nested_quant_map": ((256,), torch.float32),
            "nested_offset": ((), torch.float32),
        }

    @classmethod
    def encode(cls, weight: Tensor) -> Self:
        plain = Nf4Weight.encode(weight)
        # As quantize_4bit(compress_statistics=True) makes them of the whole matrix.
        offset = plain.absmax.mean()
        absmax, state = _bitsandbytes().quantize_blockwise(plain.absmax - offset, blocksize=NESTED_BLOCK)
        nested = {"nested_absmax": state.absmax, "nested_quant_map": state.code, "nested_offset": offset}
        return cls((weight.shape[0], weight.shape[1]), plain.dtype, {"codes": plain.codes, "absmax": absmax} | nested)

    def _nested(self) -> dict[str, Any]:
        state2 = _bitsandbytes().QuantState(
            absmax=self.nested_absmax, code=self.nested_quant_map, blocksize=NESTED_BLOCK, dtype=torch.float32
        )
        return {"offset": self.nested_offset, "state2": state2}


class Int8Weight(QuantizedWeight):
    """absmax: of each row."""

    kind = "int8"
    zero_code = 0

    def levels(self) -> str:
        return "int8"

    def single_codes(self) -> Tensor:
        return self.codes.flatten()

    def packed_codes(self, single: Tensor) -> Tensor:
        return single.view(self.codes.shape)

    @staticmethod
    def layout(rows: int, columns: int) -> Layout:
        return {"codes": ((rows, columns), torch.int8), "absmax": ((rows,), torch.float32)}

    @classmethod
    def encode(cls, weight: Tensor) -> Self:
        self = cls.of_shape((weight.shape[0], weight.shape[1]), weight.dtype, weight.device)
        for start, chunk in _chunks(weight, 1):
            rows = slice(start, start + len(chunk))
            absmax = chunk.abs().amax(1).float()
            # Divided first: 127 / absmax overflows where absmax is denormal. A row of zeros stays one.
            share = chunk.float() / absmax.masked_fill(absmax == 0, 1)[:, None]
            self.codes[rows] = share.mul_(_LARGEST_CODE).round_().nan_to_num_(0, 0, 0).to(torch.int8)
            self.absmax[rows] = absmax
        _check_finite(self.absmax)
        return self

    def decode(self) -> Tensor:
        dense = torch.empty(self.shape, dtype=self.dtype, device=self.codes.device)
        on_cpu = dense.device.type == "cpu"  # a GPU converts within the product
        rows = max(1, _DEQUANTIZED_AT_ONCE // self.shape[1]) if on_cpu else self.shape[0]
        for part, codes, absmax in zip(dense.split(rows), self.codes.split(rows), self.absmax.split(rows)):
            torch.mul(codes, (absmax / _LARGEST_CODE)[:, None], out=part)
        return dense


_FORMATS: dict[str, type[QuantizedWeight]] = {one.kind: one for one in (Nf4Weight, Nf4DqWeight, Int8Weight)}


def quantized_weights(model: nn.Module) -> dict[str, QuantizedWeight]:
    """The weights that are held quantised by the name of the linear that holds them, in the model's order."""
    found = ((name, getattr(module, "quantized", None)) for name, module in model.named_modules())
    return {name: weight for name, weight in found if isinstance(weight, QuantizedWeight)}


def check_library(kind: str) -> None:
    """Raise ValueError unless kind names a format, RuntimeError if what that needs is not installed."""
    _format(kind).check_library()


# ---------------------------------------------------------------------------------------------- private


def _format(kind: str) -> type[QuantizedWeight]:
    if kind not in _FORMATS:
        raise ValueError(f"kind must be one of {', '.join(_FORMATS)}, got {kind!r}")
    return _FORMATS[kind]


def _chunks(weight: Tensor, whole: int) -> Iterator[tuple[int, Tensor]]:
    """(first row, contiguous rows) of weight, few at a time; but for the last chunk, their number divides by whole."""
    rows = max(1, _QUANTIZED_AT_ONCE // (whole * weight.shape[1])) * whole
    for start in range(0, weight.shape[0], rows):
        yield start, weight[start : start + rows].contiguous()


def _check_finite(absmax: Tensor) -> None:
    if not absmax.isfinite().all():
        raise ValueError("weight must be finite to be quantised, got NaN or infinite values")


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
