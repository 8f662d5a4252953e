"""A mask in its weight's own memory: where(keep, weight, 0) lies there, and the dropped values lie aside, bit for bit.

    weight  1.5  NaN  2.0  -0.0        keep  1  0  1  0
    becomes 1.5  0    2.0   0          aside NaN -0.0, in row-major order

Whatever reads the weight meanwhile reads an ordinary dense one, which costs nothing. A change of the mask costs a pass
over its bits and values. The three functions are plain PyTorch; a backend's kernels take their place.
"""

import torch
from torch import Tensor

from ..ops.select import unpack_mask


def dropped_values(weight: Tensor, packed: Tensor) -> Tensor:
    """(D,): the D elements of a whole weight (N, K), or of experts (E, N, K), whose bits are 0; a copy."""
    return weight[_dropped(weight, packed)]


def drop(weight: Tensor, packed: Tensor) -> None:
    """Let +0 lie where bits are 0."""
    weight.masked_fill_(_dropped(weight, packed), 0)


def put_back(weight: Tensor, aside: Tensor, packed: Tensor) -> None:
    """Write what dropped_values gave where it came from."""
    weight.masked_scatter_(_dropped(weight, packed), aside)


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
        if self._held is not None:
            put_back(self.weight, *self._held)
        self._held = dropped_values(self.weight, packed), packed
        drop(self.weight, packed)

    @torch.no_grad()
    def lift(self) -> None:
        """The weight is whole again, bit for bit."""
        if self._held is not None:
            put_back(self.weight, *self._held)
            self._held = None

    @torch.no_grad()
    def whole(self) -> Tensor:
        """A copy of the weight as it is without the mask."""
        copy = self.weight.clone()
        if self._held is not None:
            put_back(copy, *self._held)
        return copy


def _dropped(weight: Tensor, packed: Tensor) -> Tensor:
    return unpack_mask(packed, weight.shape).logical_not_()
