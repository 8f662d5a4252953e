"""A mask in its weight's own memory, by the C++ library: passes over bits touch the weight only where bits differ."""

from torch import Tensor
from torch.autograd.graph import increment_version

from ...reference import in_place as reference
from .. import built


def put_aside(weight: Tensor, packed: Tensor, held: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Return what packed drops of a weight, row by row. The weight may hold a mask already; see the reference."""
    if not weight.is_contiguous():
        return reference.put_aside(weight, packed, held)
    return built.cpu_ops.put_aside(weight, packed, *((None, None) if held is None else held))


def put_back(weight: Tensor, aside: Tensor, held: Tensor, wanted: Tensor | None = None) -> None:
    """Write aside back to where it came from, except for what wanted drops as well."""
    if not weight.is_contiguous():
        return reference.put_back(weight, aside, held, wanted)
    built.cpu_ops.put_back_(weight, aside, held, wanted)
    increment_version(weight)


def drop(weight: Tensor, packed: Tensor, held: Tensor | None = None) -> None:
    """Write +0 where packed drops."""
    if not weight.is_contiguous():
        return reference.drop(weight, packed, held)
    built.cpu_ops.drop_(weight, packed, held)
    increment_version(weight)
