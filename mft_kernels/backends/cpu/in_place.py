"""A mask in its weight's own memory, by the C++ library: passes over bits touch the weight only where bits differ."""

from torch import Tensor
from torch.autograd.graph import increment_version

from .. import built


def put_aside(weight: Tensor, packed: Tensor, held: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Return what packed drops of a weight, row by row. The weight may hold a mask already; see the reference."""
    return built.cpu_ops.put_aside(weight, packed, *((None, None) if held is None else held))


def put_back(weight: Tensor, aside: Tensor, held: Tensor, wanted: Tensor | None = None) -> None:
    """Write aside back to where it came from, except for what wanted drops as well."""
    built.cpu_ops.put_back_(weight, aside, held, wanted)
    increment_version(weight)


def drop(weight: Tensor, packed: Tensor, held: Tensor | None = None) -> None:
    """Write +0 where packed drops."""
    built.cpu_ops.drop_(weight, packed, held)
    increment_version(weight)
