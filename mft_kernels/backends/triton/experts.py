"""What the kernels over experts share: whose rows are whose, read from offsets on the device, and how a launch of as
many programs as fit the card takes all jobs of all experts, however many that are.

    offsets          3  3  8  9      where the rows of each expert end, T = 11
    rows             0 1 2 | 3 4 5 6 7 | 8 | 9 10 nobody's
    jobs, of 2 rows  2  0  3  1      those of an expert lie together, so that its weight stays in L2
    last             2  2  5  6      job 3 is the second of expert 2

An expert without rows has no job. The host waits for nothing: it knows T and E alone.
"""

import math

import torch
from torch import Tensor

from .arguments import aligned, tiled
from .language import TensorDescriptor, tl, triton
from .target import Target


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def _largest(a, b, c, d, e, f, g, h):
    return tl.maximum(a, e), tl.maximum(b, f), tl.maximum(c, g), tl.maximum(d, h)


@triton.jit
def rows_of_experts(offsets, T, E, BLOCK_E: tl.constexpr):
    """Where the rows of each expert begin and end, (BLOCK_E,) each, within T whatever offsets are; none beyond E."""
    e = tl.arange(0, BLOCK_E)
    # One that falls is taken for the largest before it, as the oracle takes it.
    begins = tl.load(offsets + e - 1, mask=(e > 0) & (e <= E), other=0)
    ends = tl.load(offsets + e, mask=e < E, other=0)
    begins = tl.associative_scan(tl.maximum(begins, 0), 0, _larger)
    ends = tl.associative_scan(tl.maximum(ends, 0), 0, _larger)
    return tl.minimum(begins, T), tl.minimum(ends, T)


@triton.jit
def expert_of(job, begins, ends, jobs, last, BLOCK_E: tl.constexpr):
    """(expert, where its rows begin and end, its first job); jobs: how many each expert has, last: summed up."""
    first = last - jobs
    mine = (first <= job) & (job < last)
    return tl.reduce(
        (
            tl.where(mine, tl.arange(0, BLOCK_E), 0),
            tl.where(mine, begins, 0),
            tl.where(mine, ends, 0),
            tl.where(mine, first, 0),
        ),
        0,
        _largest,
    )


def rows_each(rows: int, experts: int) -> tuple[int, int]:
    """(experts, rows of each) that tiles are planned for: who has how many, the host does not know."""
    busy = min(rows, experts)
    return busy, math.ceil(rows / busy)


def block_of(experts: int) -> int:
    """BLOCK_E: a place for each."""
    return 1 << (experts - 1).bit_length()


def readable(target: Target, *tensors: Tensor) -> bool:
    """Whether matrices (E, N, K) are read by wide loads; by TMA as one matrix of E * N rows."""
    one_matrix = all(len(t) == 1 or t.stride(0) == t.shape[1] * t.stride(1) for t in tensors)
    between = all(t.stride(0) * t.element_size() % 16 == 0 for t in tensors)
    return aligned(*(t[0] for t in tensors)) and between and (one_matrix or not target.descriptors)


def tiled_matrices(tensor: Tensor, block: list[int], described: bool) -> Tensor | TensorDescriptor:
    """(E, N, K), or the descriptor of its E * N rows for tiles of ``block``."""
    return tiled(tensor.view(-1, tensor.shape[2]), block, True) if described else tensor


def rows_as_experts(offsets: Tensor, rows: int) -> Tensor:
    """The expert of each row, (rows,); E for nobody's."""
    ends = offsets.clamp(0, rows).cummax(0).values
    return torch.searchsorted(ends, torch.arange(rows, dtype=ends.dtype, device=ends.device), right=True)
