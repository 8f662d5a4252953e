"""A mask in its weight's own memory, in plain PyTorch: dropped elements are stored aside, bit for bit, and become +0.

weight is a floating matrix (N, K), or (E, N, K) for experts; kernels take only contiguous ones. Masks are contiguous
bits, see pack_mask. aside is (D,): the D dropped elements in row-major order, in the weight's dtype.
"""

import torch
from torch import Tensor

from .linear import unpack_mask


def put_aside(weight: Tensor, packed: Tensor, held: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Return a copy (D,) of the elements that packed drops.

    held: if the weight holds a mask already, its aside and that mask.
    """
    if held is not None:
        weight = weight.clone()
        put_back(weight, *held)
    return weight[_dropped(weight, packed)]


def put_back(weight: Tensor, aside: Tensor, held: Tensor, wanted: Tensor | None = None) -> None:
    """Write aside back to where the mask ``held`` dropped it, except for what the mask ``wanted`` drops as well."""
    dropped = _dropped(weight, held)
    weight.masked_scatter_(dropped, aside)
    if wanted is not None:
        weight.masked_fill_(dropped.logical_and_(_dropped(weight, wanted)), 0)


def drop(weight: Tensor, packed: Tensor, held: Tensor | None = None) -> None:
    """Write +0 where packed drops. Where the mask ``held`` drops, the weight is +0 already."""
    weight.masked_fill_(_dropped(weight, packed), 0)


def _dropped(weight: Tensor, packed: Tensor) -> Tensor:
    return torch.logical_not(unpack_mask(packed, list(weight.shape)))
