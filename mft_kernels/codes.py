"""Quantised weights: one class per format, with the layout of its tensors and the decoding that defines it.

To add a format, add a class here and enter it into FORMATS. All else reads the class: checks of arguments, kernels
(levels and block of a table of 16 levels), memory for codes. The recipe quantises a base to a format that has a class
in python/mft/quantizers.py too. nf4 and int8 are those of bitsandbytes 0.50.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

INT8_LARGEST = 127
# Weights of int8 whose fp32 temporaries on a CPU, 8 bytes per weight, stay in the cache: on a Zen 5 4 times faster than
# 2^20. On a GPU the product itself converts the dtype.
_DECODED_AT_ONCE = 1 << 18
NESTED_BLOCK = 256  # codes of absmax that share a nested absmax
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


@dataclass(frozen=True)
class Codes:
    """A weight (N, K) that is held as codes and scales, and decoded during a product.

    Weights are decoded in fp32 and rounded once to the requested dtype.

    Attributes:
        codes: of dtype code_dtype.
        scales: the tensors that the format needs to decode them, by the names scale_names.
        shape: (N, K).
        packs: whether a byte holds codes of several weights. The codes may then have any shape with as many bytes.
        zero: the code of a weight of 0.
        levels, block: what each code stands for, and how many weights share a scale, if the format is a Table.
    """

    codes: Tensor
    scales: Sequence[Tensor]
    shape: Sequence[int]

    name: ClassVar[str]
    code_dtype: ClassVar[torch.dtype]
    packs: ClassVar[bool] = False
    scale_names: ClassVar[tuple[str, ...]] = ("absmax",)
    zero: ClassVar[int] = 0
    levels: ClassVar[tuple[float, ...]] = ()
    block: ClassVar[int] = 0

    @classmethod
    def with_scales(cls, count: int) -> "type[Codes]":
        """Return the class for ``count`` scales, this one or a subclass. Raises: ValueError if none has as many."""
        forms = [form for form in FORMATS.values() if issubclass(form, cls)]
        found = [form for form in forms if len(form.scale_names) == count]
        if not found:
            counts = " or ".join(str(len(form.scale_names)) for form in forms)
            raise ValueError(f"absmax must have length {counts} for {cls.name}, got {count}")
        return found[0]

    @classmethod
    def layout(cls, shape: Sequence[int]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Return the shape and dtype of the codes, and of each scale, by name."""
        codes = cls.code_shape(shape), cls.code_dtype
        return {"codes": codes} | dict(zip(cls.scale_names, cls.scale_layout(shape)))

    @classmethod
    def empty(cls, shape: Sequence[int], device: torch.device | str | None = None) -> Self:
        """Return codes and scales that are allocated but not written."""
        codes, *scales = (torch.empty(of, dtype=dtype, device=device) for of, dtype in cls.layout(shape).values())
        return cls(codes, scales, shape)

    @classmethod
    def code_shape(cls, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape of a weight's codes."""
        return tuple(shape)

    @classmethod
    def scale_layout(cls, shape: Sequence[int]) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """Return shape and dtype of each scale."""
        return [((cls.scale_count(shape),), torch.float32)]

    @classmethod
    def scale_count(cls, shape: Sequence[int]) -> int:
        """Return the number of scales of a weight of ``shape``."""
        raise NotImplementedError

    @classmethod
    def levels_on(cls, device: torch.device) -> Tensor | None:
        """Return the levels in fp32, (16,); None if the format has none."""
        return None

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weight (N, K) in ``dtype``."""
        raise NotImplementedError

    def each(self) -> Tensor:
        """Return one code per weight, (N * K,)."""
        return self.codes.flatten()

    def packed(self, each: Tensor) -> Tensor:
        """Return codes in the shape of ``codes`` from one code per weight."""
        return each.view(self.codes.shape)

    def dropped(self, keep: Tensor) -> tuple[Tensor, Tensor]:
        """Return the codes with that of 0 where ``keep``, (N, K), is False, and the replaced codes, in order.

        The new codes decode to the masked weight bit for bit.
        """
        each, keep = self.each(), keep.flatten()
        return self.packed(torch.where(keep, each, self.zero)), each[~keep]

    def put_back(self, keep: Tensor, taken: Tensor) -> Tensor:
        """Return the codes as they were before dropped(keep) replaced ``taken``."""
        return self.packed(self.each().masked_scatter(~keep.flatten(), taken))


class Int8(Codes):
    """w[n, k] = code[n, k] * (absmax[n] / 127)"""

    name, code_dtype = "int8", torch.int8

    @classmethod
    def scale_count(cls, shape):
        return shape[0]

    def dense(self, dtype=torch.float32):
        out = torch.empty(tuple(self.shape), dtype=dtype, device=self.codes.device)
        rows = max(1, _DECODED_AT_ONCE // max(1, self.shape[1])) if out.device.type == "cpu" else max(1, len(out))
        for part, codes, absmax in zip(out.split(rows), self.codes.split(rows), self.scales[0].split(rows)):
            torch.mul(codes, (absmax / INT8_LARGEST)[:, None], out=part)
        return out


class Table(Codes):
    """w[i] = levels[code[i]] * scale[i // block], i over the whole matrix.

    Two codes per byte, the first in the high bits.

    Attributes:
        levels: 16 numbers, each 0 or from 1e-7 to 1e7 in magnitude, so that the kernels round as dense() does.
        block: a power of two.
    """

    code_dtype, packs = torch.uint8, True

    def __init_subclass__(cls) -> None:
        cls.zero = cls.levels.index(0.0)

    @classmethod
    def code_shape(cls, shape):
        return (-(-shape[0] * shape[1] // 2), 1)

    @classmethod
    def scale_count(cls, shape):
        return -(-shape[0] * shape[1] // cls.block)

    @classmethod
    @functools.cache
    def levels_on(cls, device):
        return torch.tensor(cls.levels, dtype=torch.float32, device=device)

    def dense(self, dtype=torch.float32):
        codes = self.each()
        scales = self.block_scales().repeat_interleave(self.block)[: len(codes)]
        return (self.levels_on(codes.device)[codes.int()] * scales).view(*self.shape).to(dtype)

    def block_scales(self) -> Tensor:
        """Return the scales in fp32, one per block of weights."""
        return self.scales[0]

    def each(self):
        codes = self.codes.flatten()
        return torch.stack((codes >> 4, codes & 15), 1).flatten()[: self.shape[0] * self.shape[1]]

    def packed(self, each):
        behind_the_last = self.codes.flatten()[-1:] & 15  # used if the number of codes is odd
        each = torch.cat((each, behind_the_last[: len(each) % 2]))
        return (each[::2] << 4 | each[1::2]).view(self.codes.shape)


class Nf4(Table):
    """w[i] = NF4[code[i]] * absmax[i // 64]"""

    name, levels, block = "nf4", NF4, 64


class Nf4Dq(Nf4):
    """w[i] = NF4[code[i]] * scale[i // 64], scale[b] = map[absmax[b]] * nested[b // 256] + offset (double quantisation)

    The names of the scales are those of bitsandbytes' files.
    """

    name = "nf4-dq"
    scale_names = ("absmax", "nested_absmax", "nested_quant_map", "nested_offset")

    @classmethod
    def scale_layout(cls, shape):
        blocks = cls.scale_count(shape)
        nested = [(-(-blocks // NESTED_BLOCK),), (256,), ()]
        return [((blocks,), torch.uint8), *((size, torch.float32) for size in nested)]

    def block_scales(self):
        codes, nested, levels, offset = self.scales
        return levels[codes.int()] * nested.repeat_interleave(NESTED_BLOCK)[: len(codes)] + offset


class Int4(Table):
    """w[i] = (code[i] - 8) * scale[i // 32]"""

    name, levels, block = "int4", tuple(map(float, range(-8, 8))), 32


FORMATS: dict[str, type[Codes]] = {each.name: each for each in (Nf4, Nf4Dq, Int8, Int4)}
