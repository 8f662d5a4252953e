"""A mask in its weight's own memory: it holds where(keep, weight, 0), and dropped values are stored aside, bit for bit.

    weight  1.5  NaN  2.0  -0.0        keep  1  0  1  0
    becomes 1.5  0    2.0   0          aside NaN -0.0, in row-major order

Meanwhile the weight can be read like any dense weight, at no extra cost. Changing the mask takes passes over its bits,
and touches the weight only where bits flip.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..backends.table import choose


class MaskedInPlace:
    """A weight that holds its mask, from change() until lift().

    After any exception, lift() still makes the weight whole: what undoes a write is stored before the write, and every
    write may be done twice.

    Args:
        weight: (N, K), or (E, N, K) for experts; floating, written in place.
    """

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self._held: tuple[Tensor, Tensor] | None = None  # (aside, packed), one attribute: they change together
        self._zeros: Tensor | None = None  # a mask whose dropped elements are certainly 0 in the weight

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
        """Hold this mask from now on. Nobody else may write its bits; for their layout see pack_mask."""
        packed = packed.contiguous()
        held, zeros, self._zeros = self._held, self._zeros, None
        if held is not None:
            self._run("put_back")(self.weight, *held, packed)
        self._held = self._run("put_aside")(self.weight, packed, held), packed
        self._run("drop")(self.weight, packed, zeros)
        self._zeros = packed

    @torch.no_grad()
    def lift(self) -> None:
        """Make the weight whole again, bit for bit."""
        if self._held is not None:
            self._zeros = None
            self._run("put_back")(self.weight, *self._held)
            self._held = None

    @torch.no_grad()
    def whole(self) -> Tensor:
        """Return a copy of the weight without the mask."""
        copy = self.weight.clone()
        if self._held is not None:
            self._run("put_back")(copy, *self._held)
        return copy

    def _run(self, function: str) -> Callable:
        """Return the function that serves put_aside, put_back or drop (reference/in_place.py) on this weight.

        Kernels write only to contiguous weights.
        """
        backend = "auto" if self.weight.is_contiguous() else "reference"
        return choose(function, self.weight.device, (self.weight.dtype,), backend)
