"""A weight matrix held in NF4 or int8. Kernels decode parts of it, or one product decodes the whole matrix.

    nf4     w[i] = NF4[code[i]] * absmax[i // 64]   QLoRA's sixteen levels (arXiv 2305.14314); blocks follow the rows
                                                    and cross their ends; two codes per byte: 0.5625 bytes per weight
    nf4-dq  absmax[b] = map[code[b]] * nested[b // 256] + offset    its double quantisation: 0.516 bytes per weight
    int8    w[n, k] = code[n, k] * absmax[n] / 127  1 byte per weight and 4 bytes per row

Each format is a class; _FORMATS finds them by name. NF4 is bitsandbytes'. int8 has bitsandbytes' layout, but is
computed here, because its GPU kernel takes only fp16 weights.
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
NESTED_BLOCK = 256  # absmax values that share one nested absmax
_LARGEST_CODE = 127
_QUANTIZED_AT_ONCE = 1 << 20  # weights: bitsandbytes' temporaries take about 20 bytes per weight
# Weights whose fp32 temporaries on a CPU, 8 bytes per weight, stay in the cache: on a Zen 5 4 times faster than 2^20.
_DEQUANTIZED_AT_ONCE = 1 << 18
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]  # tensor name -> (shape, dtype), in files too


class QuantizedWeight(nn.Module, QuantizedMatrix):
    """The (N, K) matrix that codes and absmax stand for; see the module's docstring for the formulas.

    It is an nn.Module so that a model moves and saves it. Casting the model changes the dtype of dense(), but no code.

    Attributes: shape: (N, K). dtype: of dense(), fp32, fp16 or bf16. One tensor for each name in the class's layout.
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
        """Return a matrix of this shape whose tensors are allocated but not written."""
        return _format(kind).of_shape(shape, dtype, device)

    @staticmethod
    @torch.no_grad()
    def quantize(weight: Tensor, kind: str = "nf4") -> "QuantizedWeight":
        """Round each weight to its nearest level, on the weight's device. Temporaries take about 20 MB.

        Args: weight: (N, K), fp32, fp16 or bf16, of any strides.
        Raises: ValueError if weight has another form or is not finite; RuntimeError if the NF4 library is missing.
        """
        if weight.dim() != 2 or not weight.numel():
            raise ValueError(f"weight must be a matrix (N, K) that is not empty, got {tuple(weight.shape)}")
        return _format(kind).encode(weight)

    @torch.no_grad()
    def dense(self) -> Tensor:
        """Return (N, K) in dtype, contiguous. Calls decode again, bit-equal. Values are rounded once, from fp32."""
        if self.codes.device.type == "cpu" and cpu.unavailable is None:
            return dequantize(self.codes, self.scales(), shape=self.shape, kind=self.levels(), dtype=self.dtype)
        return self.decode()

    def scales(self) -> list[Tensor]:
        """Return all tensors except codes, as the kernels take them."""
        return [tensor for name, tensor in self.tensors().items() if name != "codes"]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors that dense() needs on its device. Their .data may be replaced."""
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
        """Return the codes with the level 0 where ``keep`` is False, and the replaced codes, in order.

        Args: keep: Boolean, (N, K).
        Returns: New codes, which decode to the masked weight bit for bit, and the argument for put_back.
        """
        single = self.single_codes()
        return self.packed_codes(torch.where(keep.flatten(), single, self.zero_code)), single[~keep.flatten()]

    @torch.no_grad()
    def put_back(self, keep: Tensor, taken: Tensor) -> Tensor:
        """Return the codes as they were before dropped(keep) replaced ``taken``."""
        return self.packed_codes(self.single_codes().masked_scatter(~keep.flatten(), taken))

    # Each format defines:

    zero_code: ClassVar[int]

    def single_codes(self) -> Tensor:
        """Return one code per element, (N * K,)."""
        raise NotImplementedError

    def packed_codes(self, single: Tensor) -> Tensor:
        """Return these codes packed as in ``codes``."""
        raise NotImplementedError

    @staticmethod
    def check_library() -> None:
        """Raise RuntimeError if a library that the format needs is not installed."""

    @staticmethod
    def layout(rows: int, columns: int) -> Layout:
        """Return the layout of a matrix of this shape: codes, absmax and any other tensors."""
        raise NotImplementedError

    @classmethod
    def encode(cls, weight: Tensor) -> Self:
        """Return what quantize returns."""
        raise NotImplementedError

    def decode(self) -> Tensor:
        """Return what dense() returns, without a kernel of ours."""
        raise NotImplementedError

    @classmethod
    def of_shape(cls, shape: tuple[int, int], dtype: torch.dtype, device: torch.device | str | None) -> Self:
        """Return what empty returns."""
        if dtype not in _DTYPES:
            raise ValueError(f"weight must be fp32, fp16 or bf16 to be quantised, got {dtype}")
        layout = cls.layout(*shape).items()
        return cls(shape, dtype, {name: torch.empty(of, dtype=kind, device=device) for name, (of, kind) in layout})


class Nf4Weight(QuantizedWeight):
    """codes: two per byte, the first in the high bits. absmax: one for each block of 64 weights."""

    kind = "nf4"
    zero_code = 7  # of the 16 levels

    def levels(self) -> str:
        return "nf4"

    def single_codes(self) -> Tensor:
        codes = self.codes.flatten()
        return torch.stack((codes >> 4, codes & 15), 1).flatten()[: self.shape.numel()]

    def packed_codes(self, single: Tensor) -> Tensor:
        behind_the_last = self.codes.flatten()[-1:] & 15  # used if the number of codes is odd
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
        # A chunk must end at the end of a block and of a byte: 64 rows do, whatever their length.
        for start, chunk in _chunks(weight, BLOCK):
            codes, state = _bitsandbytes().quantize_4bit(chunk, quant_type="nf4", blocksize=BLOCK)
            first = start * weight.shape[1]
            self.codes[first // 2 : first // 2 + len(codes)] = codes
            self.absmax[first // BLOCK : first // BLOCK + len(state.absmax)] = state.absmax
        _check_finite(self.absmax)
        return self

    def decode(self) -> Tensor:
        # One row of even length: the CPU kernel needs that, and it covers all of the codes.
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
        """Return the fields of bitsandbytes' QuantState that describe a quantised absmax."""
        return {}


class Nf4DqWeight(Nf4Weight):
    """As Nf4Weight, but absmax is quantised too. The three nested tensors have the names of bitsandbytes' files.

    absmax: codes. nested_absmax: one for each block of 256 of them. nested_quant_map: the value of each code.
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
        # The same values as quantize_4bit(compress_statistics=True) on the whole matrix.
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
    """absmax: one per row."""

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
            # Divide first: 127 / absmax overflows if absmax is denormal. A row of zeros stays zero.
            share = chunk.float() / absmax.masked_fill(absmax == 0, 1)[:, None]
            self.codes[rows] = share.mul_(_LARGEST_CODE).round_().nan_to_num_(0, 0, 0).to(torch.int8)
            self.absmax[rows] = absmax
        _check_finite(self.absmax)
        return self

    def decode(self) -> Tensor:
        dense = torch.empty(self.shape, dtype=self.dtype, device=self.codes.device)
        on_cpu = dense.device.type == "cpu"  # on a GPU the product itself converts the dtype
        rows = max(1, _DEQUANTIZED_AT_ONCE // self.shape[1]) if on_cpu else self.shape[0]
        for part, codes, absmax in zip(dense.split(rows), self.codes.split(rows), self.absmax.split(rows)):
            torch.mul(codes, (absmax / _LARGEST_CODE)[:, None], out=part)
        return dense


_FORMATS: dict[str, type[QuantizedWeight]] = {one.kind: one for one in (Nf4Weight, Nf4DqWeight, Int8Weight)}


def quantized_weights(model: nn.Module) -> dict[str, QuantizedWeight]:
    """Return the quantised weights by the name of the linear that holds them, in the model's order."""
    found = ((name, getattr(module, "quantized", None)) for name, module in model.named_modules())
    return {name: weight for name, weight in found if isinstance(weight, QuantizedWeight)}


def check_library(kind: str) -> None:
    """Raise ValueError if kind names no format; RuntimeError if a library that the format needs is not installed."""
    _format(kind).check_library()


# ---------------------------------------------------------------------------------------------- private


def _format(kind: str) -> type[QuantizedWeight]:
    if kind not in _FORMATS:
        raise ValueError(f"kind must be one of {', '.join(_FORMATS)}, got {kind!r}")
    return _FORMATS[kind]


def _chunks(weight: Tensor, whole: int) -> Iterator[tuple[int, Tensor]]:
    """Yield (first row, contiguous rows) of weight, few at a time, a multiple of ``whole`` except in the last chunk."""
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
    # On import it logs advice to install a GEMM from the Hub, which is not used here.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        from bitsandbytes import functional as _functional
    except ImportError as error:
        raise RuntimeError(
            f'quantization nf4 needs bitsandbytes, which cannot be imported ({error}): pip install "bitsandbytes>=0.50"'
            ", or choose int8, which needs nothing"
        ) from error
    return _functional
