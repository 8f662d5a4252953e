"""Quantised weights: a class per format, with its checks and its decoding in plain PyTorch, which defines it.

A new format is a class here, entered into FORMATS, and a decoder in the kernels of each backend that multiplies it.
Formats are those of bitsandbytes 0.50. Everything is decoded in fp32 and rounded once to the dtype asked for.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

INT8_LARGEST = 127
NF4_BLOCK = 64  # weights that share an absmax
NESTED_BLOCK = 256  # codes of an absmax that share one
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
    """A weight (N, K) that is held as codes and scales, and decoded where it is multiplied.

    Attributes:
        codes: of code_dtype. scales: the tensors that a format needs beside them, in its order.
        shape: (N, K).
    """

    codes: Tensor
    scales: Sequence[Tensor]
    shape: Sequence[int]

    name: ClassVar[str]
    code_dtype: ClassVar[torch.dtype]

    @classmethod
    def code_shape(cls, shape: Sequence[int]) -> tuple[int, ...]:
        """Of the codes of a weight of ``shape``; one dimension stands for any shape of as many elements."""
        raise NotImplementedError

    @classmethod
    def scales_expected(cls, shape: Sequence[int], count: int) -> list[tuple[str, tuple[int, ...], torch.dtype]]:
        """Name, shape and dtype of each of ``count`` scales. Raises: ValueError if the format has not so many."""
        raise NotImplementedError

    def decode(self) -> Tensor:
        """The dense weight (N, K) in fp32."""
        raise NotImplementedError

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The dense weight (N, K), rounded once to ``dtype``."""
        return self.decode().to(dtype)


class Int8(Codes):
    """w[n, k] = code[n, k] * (absmax[n] / 127)"""

    name, code_dtype = "int8", torch.int8

    @classmethod
    def code_shape(cls, shape):
        return tuple(shape)

    @classmethod
    def scales_expected(cls, shape, count):
        if count != 1:
            raise ValueError(f"absmax must be one tensor for int8, got {count}")
        return [("absmax", (shape[0],), torch.float32)]

    def decode(self):
        return self.codes * (self.scales[0] / INT8_LARGEST)[:, None]


class Nf4(Codes):
    """w[i] = NF4[code[i]] * absmax[i // 64], i over the whole matrix; two codes per byte, the first in the high bits.

    With double quantisation absmax is itself four tensors, (codes, nested, map, offset):
    absmax[b] = map[codes[b]] * nested[b // 256] + offset.
    """

    name, code_dtype = "nf4", torch.uint8

    @classmethod
    def code_shape(cls, shape):
        return (-(-shape[0] * shape[1] // 2),)

    @classmethod
    def scales_expected(cls, shape, count):
        blocks = -(-shape[0] * shape[1] // NF4_BLOCK)
        if count == 1:
            return [("absmax", (blocks,), torch.float32)]
        if count != 4:
            raise ValueError(f"absmax must be one tensor, or for nf4 the four of double quantisation, got {count}")
        return [
            ("absmax[0]", (blocks,), torch.uint8),
            ("absmax[1]", (-(-blocks // NESTED_BLOCK),), torch.float32),
            ("absmax[2]", (256,), torch.float32),
            ("absmax[3]", (), torch.float32),
        ]

    def decode(self):
        numel = self.shape[0] * self.shape[1]
        codes = self.codes.view(-1)
        levels = torch.tensor(NF4, device=codes.device)
        both = torch.stack((codes >> 4, codes & 15), 1).view(-1)[:numel]
        return (levels[both.int()] * self.absmax().repeat_interleave(NF4_BLOCK)[:numel]).view(*self.shape)

    def absmax(self) -> Tensor:
        """fp32, one per block of weights."""
        if len(self.scales) == 1:
            return self.scales[0]
        codes, nested, levels, offset = self.scales
        return levels[codes.int()] * nested.repeat_interleave(NESTED_BLOCK)[: len(codes)] + offset


FORMATS: dict[str, type[Codes]] = {each.name: each for each in (Nf4, Int8)}
