"""The formats that a base can be quantised to: one class each, which encodes weights as codes of mft_kernels/codes.py.

NF4 is bitsandbytes'. int8 has bitsandbytes' layout, but is computed here, because its GPU kernel takes only fp16
weights. To add a format, add a class here and enter it into QUANTIZERS, under the name of its class in codes.py.

Configurations read the names, and estimates the bytes, so torch is imported only when a weight is quantised.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from mft_kernels.internal import Codes

DEFAULT = "nf4"  # where a base must be quantised, and nobody says how
_AT_ONCE = 1 << 20  # weights: bitsandbytes' temporaries take about 20 bytes per weight


class Quantizer:
    """A format of a quantised base. Estimates count bytes_a_weight and bytes_a_row."""

    name: str
    bytes_a_weight: float
    bytes_a_row = 0

    def bytes(self, rows: int, columns: int) -> int:
        return int(rows * columns * self.bytes_a_weight) + rows * self.bytes_a_row

    def check_library(self) -> None:
        """Raise RuntimeError if a library that the format needs is not installed."""

    def encode(self, weight: Tensor) -> Codes:
        """Return codes of a weight (N, K), rounded to nearest levels. Raises: ValueError if it is not finite."""
        raise NotImplementedError

    def dense(self, coded: Codes, dtype: torch.dtype) -> Tensor:
        """Return coded.dense(dtype), computed by a library that needs less memory."""
        return coded.dense(dtype)


class Nf4(Quantizer):
    """QLoRA's sixteen levels (arXiv 2305.14314)."""

    name, bytes_a_weight = "nf4", 0.5 + 4 / 64  # one fp32 scale for each 64 weights

    def check_library(self) -> None:
        _bitsandbytes()

    def encode(self, weight: Tensor) -> Codes:
        from mft_kernels.internal import Nf4

        found = Nf4.empty(weight.shape, weight.device)
        block, (absmax,) = Nf4.block, found.scales
        # A chunk must end at the end of a block and of a byte: 64 rows do, whatever their length.
        for start, chunk in _chunks(weight, block):
            codes, state = _bitsandbytes().quantize_4bit(chunk, quant_type="nf4", blocksize=block)
            first = start * weight.shape[1]
            found.codes[first // 2 : first // 2 + len(codes)] = codes
            absmax[first // block : first // block + len(state.absmax)] = state.absmax
        _check_finite(absmax)
        return found

    def dense(self, coded: Codes, dtype: torch.dtype) -> Tensor:
        import torch

        functional, numel = _bitsandbytes(), coded.shape[0] * coded.shape[1]
        # One row of even length: the CPU kernel needs that, and it covers all of the codes.
        row, scales = torch.Size((1, 2 * coded.codes.numel())), self._scales(*coded.scales)
        state = functional.QuantState(**scales, shape=row, dtype=dtype, blocksize=coded.block, quant_type="nf4")
        return functional.dequantize_4bit(coded.codes, state).view(-1)[:numel].view(*coded.shape)

    def _scales(self, absmax: Tensor, *nested: Tensor) -> dict[str, Any]:
        """Return the fields of bitsandbytes' QuantState that describe the scales."""
        return {"absmax": absmax}


class Nf4Dq(Nf4):
    """nf4 with double quantisation."""

    name, bytes_a_weight = "nf4-dq", 0.5 + (1 + 4 / 256) / 64  # 1-byte scales, an fp32 for each 256 of them

    def encode(self, weight: Tensor) -> Codes:
        from mft_kernels.internal import NESTED_BLOCK, Nf4Dq

        plain = super().encode(weight)
        # The same values as quantize_4bit(compress_statistics=True) on the whole matrix.
        (scales,) = plain.scales
        offset = scales.mean()
        absmax, state = _bitsandbytes().quantize_blockwise(scales - offset, blocksize=NESTED_BLOCK)
        return Nf4Dq(plain.codes, [absmax, state.absmax, state.code, offset], plain.shape)

    def _scales(self, absmax: Tensor, *nested: Tensor) -> dict[str, Any]:
        import torch

        from mft_kernels.internal import NESTED_BLOCK

        scale, levels, offset = nested
        state = _bitsandbytes().QuantState(absmax=scale, code=levels, blocksize=NESTED_BLOCK, dtype=torch.float32)
        return {"absmax": absmax, "offset": offset, "state2": state}


class Int8(Quantizer):
    """One scale per row."""

    name, bytes_a_weight, bytes_a_row = "int8", 1, 4

    def encode(self, weight: Tensor) -> Codes:
        from mft_kernels.internal import INT8_LARGEST, Int8

        found = Int8.empty(weight.shape, weight.device)
        (scales,) = found.scales
        for start, chunk in _chunks(weight, 1):
            rows = slice(start, start + len(chunk))
            absmax = chunk.abs().amax(1).float()
            # Divide first: 127 / absmax overflows if absmax is denormal. A row of zeros stays zero.
            share = chunk.float() / absmax.masked_fill(absmax == 0, 1)[:, None]
            found.codes[rows] = share.mul_(INT8_LARGEST).round_().nan_to_num_(0, 0, 0).to(found.codes.dtype)
            scales[rows] = absmax
        _check_finite(scales)
        return found


QUANTIZERS: dict[str, Quantizer] = {each.name: each for each in (Nf4(), Nf4Dq(), Int8())}


def quantizer(kind: str) -> Quantizer:
    """Return the format of that name. Raises: ValueError if there is none."""
    if kind not in QUANTIZERS:
        raise ValueError(f"kind must be one of {', '.join(QUANTIZERS)}, got {kind!r}")
    return QUANTIZERS[kind]


# ---------------------------------------------------------------------------------------------- private


def _chunks(weight: Tensor, whole: int) -> Iterator[tuple[int, Tensor]]:
    """Yield (first row, contiguous rows) of weight, few at a time, a multiple of ``whole`` except in the last chunk."""
    rows = max(1, _AT_ONCE // (whole * weight.shape[1])) * whole
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
