"""Matrices that are spread over processes by rows: DTensors, as fully_shard makes them.

What depends on an element's place in a matrix must not depend on how many processes hold the matrix. So a spread matrix
is stepped in bands, equal groups of rows, each like a separate matrix: 8-bit blocks do not cross the border of a band,
and each band has its own key for random words.

    64 rows, 4 processes     process 0: bands 0 to 15     process 1: bands 16 to 31     ...
    64 rows, 2 processes     process 0: bands 0 to 31     process 1: bands 32 to 63
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

_MOST_BANDS = 64  # of a matrix: the most processes that can share it, and the most calls per step on one process


def is_spread(tensor: Tensor) -> bool:
    """Return whether processes hold parts of tensor: finds a DTensor without importing torch.distributed.tensor."""
    return hasattr(tensor, "full_tensor")


def rows_here(tensor: Tensor) -> Tensor:
    """Return the rows that this process holds, without a copy; all rows of a plain tensor."""
    return tensor.detach().to_local() if is_spread(tensor) else tensor  # type: ignore[attr-defined]


def bands_of(shape: torch.Size) -> int:
    """Return how many bands a spread tensor has. Experts (E, N, K) have one each."""
    return shape[0] if len(shape) == 3 else math.gcd(shape[0], _MOST_BANDS)


def check_spread(name: str, tensor: Tensor, *, in_bands: bool) -> None:
    """Raise ValueError unless a spread tensor is spread by rows and, if in_bands, by whole bands."""
    placements = [place for place in tensor.placements if not place.is_replicate()]  # type: ignore[attr-defined]
    if [(place.is_shard(), getattr(place, "dim", None)) for place in placements] != [(True, 0)]:
        raise ValueError(
            f"{name} must be spread by rows, got a DTensor of shape {tuple(tensor.shape)} with the placements "
            f"{tuple(tensor.placements)}: call fully_shard without a shard_placement_fn"  # type: ignore[attr-defined]
        )
    bands, processes = bands_of(tensor.shape), _mesh(tensor)[1]
    if in_bands and len(tensor.shape) < 3 and bands % processes:
        raise ValueError(
            f"{name} with 8-bit moments or 16-bit scores must have rows that the processes share in whole bands, got "
            f"shape {tuple(tensor.shape)}, which has {bands}, on {processes} processes: take a number of processes "
            f"that divides {bands}, or fp32 scores with moments='fp32'"
        )


def first_row(tensor: Tensor) -> int:
    """Return the index of this process's first row in a spread tensor."""
    rank, processes = _mesh(tensor)
    return min(rank * -(-tensor.shape[0] // processes), tensor.shape[0])


def spread_like(local: Tensor, tensor: Tensor, shape: Sequence[int]) -> Any:
    """Return a DTensor of this shape, spread like tensor. ``local`` holds the rows of this process."""
    from torch.distributed.tensor import DTensor  # a slow import

    of: Any = tensor
    size = torch.Size(shape)
    stride = torch.empty(size, device="meta").stride()
    return DTensor.from_local(local, of.device_mesh, of.placements, run_check=False, shape=size, stride=stride)


def split_bands(tensor: Tensor) -> Iterator[tuple[int, slice]]:
    """Yield (number, rows among those here) of each band of a spread tensor that this process holds."""
    rows, here = tensor.shape[0] // bands_of(tensor.shape), rows_here(tensor).shape[0]
    first = first_row(tensor) // rows
    for place in range(here // rows):
        yield first + place, slice(place * rows, (place + 1) * rows)


def _mesh(tensor: Any) -> tuple[int, int]:
    """Return this process's place among the processes that share the rows, and their number."""
    at = next(i for i, place in enumerate(tensor.placements) if place.is_shard())
    return tensor.device_mesh.get_local_rank(at), tensor.device_mesh.size(at)
