"""Quantised weights for tests, with random codes and scales, or with small integers, whose products are exact."""

from typing import NamedTuple

import torch
from by_name import oracle
from torch import Tensor

from mft_kernels.codes import FORMATS, INT8_LARGEST

KINDS = tuple(FORMATS)
#: Formats whose scales are numbers, not codes.
PLAIN_KINDS = tuple(kind for kind in KINDS if len(FORMATS[kind].scale_names) == 1)


class Coded(NamedTuple):
    """The arguments, in their order, that the ops take for a quantised weight of ``shape``."""

    codes: Tensor
    absmax: list[Tensor]
    shape: list[int]
    kind: str

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
    form, generator = FORMATS[kind], torch.Generator().manual_seed(seed)

    def choice(values, *shape: int) -> Tensor:
        return torch.tensor(values)[torch.randint(len(values), shape, generator=generator)]

    codes = [-1, 0, 1] if integers else range(-128, 128)
    if form.levels:
        codes = [form.levels.index(value) for value in (-1.0, 0.0, 1.0)] if integers else range(len(form.levels))
    empty = form(torch.zeros(form.code_shape((n, k)), dtype=form.code_dtype), [], (n, k))
    absmax = []
    for size, dtype in form.scale_layout((n, k)):
        if not dtype.is_floating_point:
            absmax.append(choice(range(256), *size).to(dtype))
        elif integers:
            whole = choice([1.0, 2.0, -4.0] if kind in PLAIN_KINDS else [1.0, -1.0], *size)
            absmax.append(whole if form.levels else whole * INT8_LARGEST)
        else:
            absmax.append(torch.randn(size, generator=generator))
    return Coded(empty.packed(choice(codes, n * k).to(form.code_dtype)), absmax, [n, k], kind)
