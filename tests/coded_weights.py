"""Quantised weights for tests, with random codes and scales, or with small integers, whose products are exact."""

from typing import NamedTuple

import torch
from by_name import oracle
from torch import Tensor

from mft_kernels.codes import FORMATS, Table

#: "nf4-dq" is nf4 with double quantisation.
KINDS = ("nf4", "nf4-dq", "int8", "int4")


class Coded(NamedTuple):
    """The arguments, in their order, that the ops take for a quantised weight of ``shape``."""

    codes: Tensor
    absmax: list[Tensor]
    shape: list[int]
    kind: str  # the name that the ops use

    def dense(self, dtype: torch.dtype) -> Tensor:
        """Return the weight as decoded by the reference, on the CPU."""
        return oracle.dequantize(self.codes.cpu(), [scale.cpu() for scale in self.absmax], *self[2:], dtype)

    def to(self, device: torch.device) -> "Coded":
        return self._replace(codes=self.codes.to(device), absmax=[scale.to(device) for scale in self.absmax])


def coded(n: int, k: int, kind: str, *, integers: bool = False, seed: int = 0) -> Coded:
    """Return a random quantised weight of shape (n, k).

    With ``integers``, its elements are -1, 0 and 1 times scales that are small powers of two. Otherwise it draws from
    all codes, with scales of either sign.
    """
    generator = torch.Generator().manual_seed(seed)

    def choice(values, *shape: int) -> Tensor:
        return torch.tensor(values)[torch.randint(len(values), shape, generator=generator)]

    def scales(*shape: int) -> Tensor:
        return choice([1.0, 2.0, -4.0], *shape) if integers else torch.randn(shape, generator=generator)

    name = kind.removesuffix("-dq")
    if name == "int8":
        codes = choice(range(-1, 2) if integers else range(-128, 128), n, k).to(torch.int8)
        return Coded(codes, [scales(n) * (127 if integers else 1)], [n, k], name)
    form = FORMATS[name]
    assert issubclass(form, Table)
    of_integers = [form.levels.index(value) for value in (-1.0, 0.0, 1.0)]
    codes = choice(of_integers if integers else range(16), 2, -(-n * k // 2))
    codes, blocks = (codes[0] << 4 | codes[1]).to(torch.uint8), -(-n * k // form.block)
    if kind == name:
        return Coded(codes, [scales(blocks)], [n, k], name)
    nested, levels, offset = scales(-(-blocks // 256)), scales(256), scales(1)[0]
    if integers:
        nested, levels, offset = nested.sign(), levels.clamp(min=-2), offset.sign()
    return Coded(codes, [choice(range(256), blocks).to(torch.uint8), nested, levels, offset], [n, k], name)
