"""The bits of a GGUF block that hold one weight, and the value of these bits that is an exact zero: a class per type.

The layouts are those of ggml's ggml-quants.c, as gguf.quants reads them. A type that is missing here has no exact zero:
Q4_1, Q5_1, Q2_K, Q4_K and Q5_K store d * code + min, and the tables of IQ* do not contain 0.
"""

import functools
from dataclasses import dataclass

import numpy as np
from gguf.constants import GGMLQuantizationType

_INFINITE = 0x7C00  # the exponent of a float16 that is infinite or NaN


@dataclass(frozen=True)
class Field:
    """A part of a weight's code. For the weight at position p of a block, it is in byte ``byte[p]``.

    ``tables[slot[p]]`` maps each value of that byte to the one in which this field is a zero's and all other bits stay.
    """

    byte: np.ndarray  # (values,)
    slot: np.ndarray  # (values,)
    tables: np.ndarray  # (slots, 256) uint8


def bits(byte: np.ndarray, shift: np.ndarray | int, count: int, zero: int) -> Field:
    """Return a field of ``count`` bits from bit ``shift`` on, which have the value ``zero`` in a weight of 0."""
    shifts, slot = np.unique(np.broadcast_to(shift, byte.shape), return_inverse=True)
    kept = 0xFF & ~(((1 << count) - 1) << shifts[:, None])
    return Field(byte, slot, (np.arange(256) & kept | zero << shifts[:, None]).astype(np.uint8))


class Code:
    """A type of tensors with an exact zero: blocks of ``size`` bytes, which hold ``values`` weights each."""

    values: int
    size: int
    scale: int | None = None  # the first byte of the block's float16 scale

    @property
    def name(self) -> str:
        return type(self).__name__

    def fields(self) -> tuple[Field, ...]:
        """Return the fields that together are a weight's code."""
        raise NotImplementedError

    def clear(self, data: np.ndarray, elements: np.ndarray) -> np.ndarray:
        """Return a tensor's bytes with exact zeros for these weights (int64, each once); others keep their bits.

        Raises: ValueError if a scale is infinite or NaN, because its product with a code of 0 is not zero.
        """
        blocks, position = np.divmod(elements, self.values)
        infinite = blocks[~self.finite(data, blocks)]
        if len(infinite):
            raise ValueError(
                f"a scale in block {infinite[0]} that is infinite or NaN, so that its product with 0 is not 0"
            )
        data = data.copy()
        for field in self._parts:
            places, slot = blocks * self.size + field.byte[position], field.slot[position]
            for number, table in enumerate(field.tables):  # within a slot, each byte occurs once
                chosen = places[slot == number] if len(field.tables) > 1 else places
                data[chosen] = table[data[chosen]]
        return data

    @functools.cached_property
    def _parts(self) -> tuple[Field, ...]:
        return self.fields()

    def finite(self, data: np.ndarray, blocks: np.ndarray) -> np.ndarray:
        """Return, for each of these blocks, whether its scale is a finite number."""
        if self.scale is None:
            return np.ones(len(blocks), bool)
        high = data[blocks * self.size + self.scale + 1]
        return (high.astype(np.int32) << 8 & _INFINITE) != _INFINITE


class _Float(Code):
    """A number per weight; +0 is all bits 0."""

    values = 1

    def fields(self) -> tuple[Field, ...]:
        return tuple(bits(np.array([byte]), 0, 8, 0) for byte in range(self.size))


class F32(_Float):
    size = 4


class F16(_Float):
    size = 2


class BF16(_Float):
    size = 2


class Q8_0(Code):
    """d, 32 int8: weight = d * code."""

    values, size, scale = 32, 34, 0

    def fields(self) -> tuple[Field, ...]:
        return (bits(2 + np.arange(32), 0, 8, 0),)


class Q4_0(Code):
    """d, 16 bytes of two codes, p and p + 16: weight = d * (code - 8)."""

    values, size, scale = 32, 18, 0

    def fields(self) -> tuple[Field, ...]:
        p = np.arange(32)
        return (bits(2 + p % 16, p // 16 * 4, 4, 8),)


class Q5_0(Code):
    """d, 4 bytes of the codes' highest bits, 16 bytes of the others: weight = d * (code - 16)."""

    values, size, scale = 32, 22, 0

    def fields(self) -> tuple[Field, ...]:
        p = np.arange(32)
        return bits(2 + p // 8, p % 8, 1, 1), bits(6 + p % 16, p // 16 * 4, 4, 0)


class Q6_K(Code):
    """128 bytes of the codes' low 4 bits, 64 of their high 2, 16 scales, d: weight = d * scale * (code - 32)."""

    values, size, scale = 256, 210, 208

    def fields(self) -> tuple[Field, ...]:
        half, p = np.divmod(np.arange(256), 128)
        low = bits(64 * half + p % 64, p // 64 * 4, 4, 0)
        return low, bits(128 + 32 * half + p % 32, p // 32 * 2, 2, 2)


class Q3_K(Code):
    """32 bytes of high bits, 64 of the low 2, 12 of scales, d: weight = d * scale * (low - (0 if high else 4))."""

    values, size, scale = 256, 110, 108

    def fields(self) -> tuple[Field, ...]:
        half, p = np.divmod(np.arange(256), 128)
        whole = np.arange(256)
        return bits(whole % 32, whole // 32, 1, 1), bits(32 + 32 * half + p % 32, p // 32 * 2, 2, 0)


class TQ2_0(Code):
    """64 bytes of four codes, d: weight = d * (code - 1)."""

    values, size, scale = 256, 66, 64

    def fields(self) -> tuple[Field, ...]:
        half, p = np.divmod(np.arange(256), 128)
        return (bits(32 * half + p % 32, p // 32 * 2, 2, 1),)


class TQ1_0(Code):
    """48 bytes of five base-3 digits each, 4 bytes of four digits each, d: weight = d * (digit - 1)."""

    values, size, scale = 256, 54, 52

    def fields(self) -> tuple[Field, ...]:
        p = np.arange(256)
        part = np.select([p < 160, p < 240], [0, 1], 2)  # 32 bytes, 16 bytes, 4 bytes
        digit, byte = np.divmod(p - np.array([0, 160, 240])[part], np.array([32, 16, 4])[part])
        # The tables: each byte with one digit set to 1. A byte is its digits as a fraction, rounded up.
        powers = 3 ** np.arange(5)
        digits = (np.arange(256)[:, None] * powers % 256) * 3 >> 8
        made = np.where(np.eye(5, dtype=bool)[:, None, :], 1, digits)  # (5, 256, 5)
        tables = ((made @ powers[::-1] * 256 + 242) // 243).astype(np.uint8)
        return (Field(np.array([0, 32, 48])[part] + byte, digit, tables),)


class MXFP4(Code):
    """An exponent, 16 bytes of two codes, p and p + 16. Codes are floats of 4 bits; code 0 is +0."""

    values, size = 32, 17

    def fields(self) -> tuple[Field, ...]:
        p = np.arange(32)
        return (bits(1 + p % 16, p // 16 * 4, 4, 0),)

    def finite(self, data: np.ndarray, blocks: np.ndarray) -> np.ndarray:
        return data[blocks * self.size] != 255  # the format's NaN; ggml reads it as 2 ** 127


CODES: dict[str, Code] = {
    code.name: code
    for code in (F32(), F16(), BF16(), Q8_0(), Q4_0(), Q5_0(), Q6_K(), Q3_K(), TQ1_0(), TQ2_0(), MXFP4())
}


def code_of(kind: int) -> Code | None:
    """Return the code of a tensor type, given by its number in ggml, or None if no exact zero is known for it."""
    return CODES.get(GGMLQuantizationType(kind).name)
