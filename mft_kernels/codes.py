"""Quantised weights: one class per format, with its checks and the decoding in plain PyTorch that defines it.

To add a table of 16 levels, add a class here and enter it into FORMATS: kernels take its levels and block from there.
nf4 and int8 are those of bitsandbytes 0.50. Weights are decoded in fp32 and rounded once to the requested dtype.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

INT8_LARGEST = 127
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

    Attributes:
        codes: of dtype code_dtype.
        scales: the tensors that the format needs to decode them, in its order.
        shape: (N, K).
        has_coded_scales: whether the scales may be codes too, with tensors that decode them.
    """

    codes: Tensor
    scales: Sequence[Tensor]
    shape: Sequence[int]

    name: ClassVar[str]
    code_dtype: ClassVar[torch.dtype]
    has_coded_scales: ClassVar[bool] = False

    @classmethod
    def code_shape(cls, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape of a weight's codes. A 1-d shape stands for any shape with as many elements."""
        raise NotImplementedError

    @classmethod
    def scales_expected(cls, shape: Sequence[int], count: int) -> list[tuple[str, tuple[int, ...], torch.dtype]]:
        """Return name, shape and dtype of ``count`` scales. Raises: ValueError if the format has another number."""
        if count != 1:
            raise ValueError(f"absmax must be one tensor for {cls.name}, got {count}")
        return [("absmax", (cls.scale_count(shape),), torch.float32)]

    @classmethod
    def scale_count(cls, shape: Sequence[int]) -> int:
        """Return the number of scales of a weight of ``shape``."""
        raise NotImplementedError

    def decode(self) -> Tensor:
        """Return the dense weight (N, K) in fp32."""
        raise NotImplementedError

    def dense(self, dtype: torch.dtype) -> Tensor:
        """Return the dense weight (N, K), rounded once to ``dtype``."""
        return self.decode().to(dtype)


class Int8(Codes):
    """w[n, k] = code[n, k] * (absmax[n] / 127)"""

    name, code_dtype = "int8", torch.int8

    @classmethod
    def code_shape(cls, shape):
        return tuple(shape)

    @classmethod
    def scale_count(cls, shape):
        return shape[0]

    def decode(self):
        return self.codes * (self.scales[0] / INT8_LARGEST)[:, None]


class Table(Codes):
    """w[i] = levels[code[i]] * scale[i // block], i over the whole matrix.

    Two codes per byte, the first in the high bits.

    Attributes:
        levels: 16 numbers, each 0 or from 1e-7 to 1e7 in magnitude, so that the kernels round as decode() does.
        block: how many weights share a scale, a power of two.
    """

    code_dtype = torch.uint8
    levels: ClassVar[tuple[float, ...]]
    block: ClassVar[int]

    @classmethod
    def code_shape(cls, shape):
        return (-(-shape[0] * shape[1] // 2),)

    @classmethod
    def scale_count(cls, shape):
        return -(-shape[0] * shape[1] // cls.block)

    @classmethod
    @functools.cache
    def levels_on(cls, device: torch.device) -> Tensor:
        """Return the levels in fp32, (16,)."""
        return torch.tensor(cls.levels, dtype=torch.float32, device=device)

    def decode(self):
        numel = self.shape[0] * self.shape[1]
        codes = self.codes.view(-1)
        both = torch.stack((codes >> 4, codes & 15), 1).view(-1)[:numel]
        scales = self.block_scales().repeat_interleave(self.block)[:numel]
        return (self.levels_on(codes.device)[both.int()] * scales).view(*self.shape)

    def block_scales(self) -> Tensor:
        """Return the scales in fp32, one per block of weights."""
        return self.scales[0]


class Nf4(Table):
    """w[i] = NF4[code[i]] * absmax[i // 64]

    With double quantisation absmax is itself four tensors, (codes, nested, map, offset):
    absmax[b] = map[codes[b]] * nested[b // 256] + offset.
    """

    name, levels, block, has_coded_scales = "nf4", NF4, 64, True

    @classmethod
    def scales_expected(cls, shape, count):
        if count == 1:
            return super().scales_expected(shape, count)
        if count != 4:
            raise ValueError(
                f"absmax must be one tensor, or the four tensors of double quantisation for nf4, got {count}"
            )
        blocks = cls.scale_count(shape)
        return [
            ("absmax[0]", (blocks,), torch.uint8),
            ("absmax[1]", (-(-blocks // NESTED_BLOCK),), torch.float32),
            ("absmax[2]", (256,), torch.float32),
            ("absmax[3]", (), torch.float32),
        ]

    def block_scales(self):
        if len(self.scales) == 1:
            return self.scales[0]
        codes, nested, levels, offset = self.scales
        return levels[codes.int()] * nested.repeat_interleave(NESTED_BLOCK)[: len(codes)] + offset


class Int4(Table):
    """w[i] = (code[i] - 8) * scale[i // 32]"""

    name, levels, block = "int4", tuple(map(float, range(-8, 8))), 32


FORMATS: dict[str, type[Codes]] = {each.name: each for each in (Nf4, Int8, Int4)}
