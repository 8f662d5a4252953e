"""A mask in its weight's own memory, in plain PyTorch: what it drops lies aside, bit for bit, and +0 in its place.

weight is whole, (N, K), or of experts (E, N, K), and floating. Masks are bits, as of pack_mask, and contiguous. aside
is (D,): the D dropped elements in row-major order, in the weight's dtype.
"""

import torch
from torch import Tensor

from .linear import unpack_mask


def put_aside(weight: Tensor, packed: Tensor, held: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """What packed drops of a weight that holds a mask already: (aside, the mask that dropped it). A copy, (D,)."""
    if held is not None:
        weight = weight.clone()
        put_back(weight, *held)
    return weight[_dropped(weight, packed)]


def put_back(weight: Tensor, aside: Tensor, held: Tensor, wanted: Tensor | None = None) -> None:
    """Write aside to where the mask ``held`` dropped it from, but for what the mask ``wanted`` drops as well."""
    dropped = _dropped(weight, held)
    weight.masked_scatter_(dropped, aside)
    if wanted is not None:
        weight.masked_fill_(dropped.logical_and_(_dropped(weight, wanted)), 0)


def drop(weight: Tensor, packed: Tensor, held: Tensor | None = None) -> None:
    """Let +0 lie where packed drops; it does already where the mask ``held`` does."""
    weight.masked_fill_(_dropped(weight, packed), 0)


def _dropped(weight: Tensor, packed: Tensor) -> Tensor:
    return torch.logical_not(unpack_mask(packed, list(weight.shape)))
