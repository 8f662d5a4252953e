"""A mask in its weight's own memory: where(keep, weight, 0) lies there, and the dropped values lie aside, bit for bit.

    weight  1.5  NaN  2.0  -0.0        keep  1  0  1  0
    becomes 1.5  0    2.0   0          aside NaN -0.0, in row-major order

Whatever reads the weight meanwhile reads an ordinary dense one, which costs nothing. A change of the mask costs passes
over its bits, and touches the weight where bits flip.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..backends.table import choose


class MaskedInPlace:
    """A weight that holds its mask, from change() until lift().

    An exception, wherever it comes from, leaves a weight that lift() makes whole: each write is done with what undoes
    it stored already, and may be done twice.

    Args:
        weight: (N, K), or of experts (E, N, K), floating; written in place.
    """

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self._held: tuple[Tensor, Tensor] | None = None  # (aside, packed), one attribute: they change together
        self._zeros: Tensor | None = None  # a mask for whose dropped elements 0 surely lies there

    @property
    def packed(self) -> Tensor | None:
        """The mask that the weight holds; None while it is whole."""
        return None if self._held is None else self._held[1]

    @property
    def aside(self) -> Tensor | None:
        """(D,): what the mask drops, in the weight's dtype; None while the weight is whole."""
        return None if self._held is None else self._held[0]

    @torch.no_grad()
    def change(self, packed: Tensor) -> None:
        """Hold this mask from now on: bits as of pack_mask, which nobody else may write."""
        packed = packed.contiguous()
        held, zeros, self._zeros = self._held, self._zeros, None
        if held is not None:
            self._run("put_back")(self.weight, *held, packed)
        self._held = self._run("put_aside")(self.weight, packed, held), packed
        self._run("drop")(self.weight, packed, zeros)
        self._zeros = packed

    @torch.no_grad()
    def lift(self) -> None:
        """The weight is whole again, bit for bit."""
        if self._held is not None:
            self._zeros = None
            self._run("put_back")(self.weight, *self._held)
            self._held = None

    @torch.no_grad()
    def whole(self) -> Tensor:
        """A copy of the weight as it is without the mask."""
        copy = self.weight.clone()
        if self._held is not None:
            self._run("put_back")(copy, *self._held)
        return copy

    def _run(self, function: str) -> Callable:
        """What serves one of put_aside, put_back and drop, of reference/in_place.py, on this weight."""
        return choose(function, self.weight.device, (self.weight.dtype,), "auto", op=function)
