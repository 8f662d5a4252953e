"""Functions that the kernels over experts share: find each expert's rows, and hand out the jobs of all experts.

A kernel reads from offsets, on the device, which rows belong to which expert. A launch has as many programs as fit on
the card, and they take all jobs of all experts:

    offsets          3  3  8  9      where the rows of each expert end, T = 11
    rows             0 1 2 | 3 4 5 6 7 | 8 | 9 10 of no expert
    jobs, of 2 rows  2  0  3  1      those of an expert are adjacent, so that its weight stays in L2
    last             2  2  5  6      job 3 is the second of expert 2

In a product, an expert without rows has no job. The host never waits: it needs only T and E.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .arguments import aligned, tiled
from .target import Target


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def _largest(a, b, c, d, e, f, g, h):
    return tl.maximum(a, e), tl.maximum(b, f), tl.maximum(c, g), tl.maximum(d, h)


@triton.jit
def rows_of_experts(offsets, T, E, BLOCK_E: tl.constexpr):
    """Return where the rows of each expert begin and end, (BLOCK_E,) each.

    They stay within T for any offsets. Places beyond E have no rows.
    """
    e = tl.arange(0, BLOCK_E)
    # An offset that falls counts as the largest before it, as in the oracle.
    begins = tl.load(offsets + e - 1, mask=(e > 0) & (e <= E), other=0)
    ends = tl.load(offsets + e, mask=e < E, other=0)
    begins = tl.associative_scan(tl.maximum(begins, 0), 0, _larger)
    ends = tl.associative_scan(tl.maximum(ends, 0), 0, _larger)
    return tl.minimum(begins, T), tl.minimum(ends, T)


@triton.jit
def expert_of(job, begins, ends, jobs, last, BLOCK_E: tl.constexpr):
    """Return (expert, begin and end of its rows, its first job). jobs: the number per expert; last: its running sum."""
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
    """Return (experts, rows of each) to plan tiles for. The host does not know how many rows each expert really has."""
    busy = min(rows, experts)
    return busy, math.ceil(rows / busy)


def block_of(experts: int) -> int:
    """Return BLOCK_E: a power of 2 with a place for each expert."""
    return 1 << (experts - 1).bit_length()


def readable(target: Target, *tensors: Tensor) -> bool:
    """Return whether matrices (E, N, K) can be read by wide loads, or by TMA as one matrix of E * N rows."""
    one_matrix = all(len(t) == 1 or t.stride(0) == t.shape[1] * t.stride(1) for t in tensors)
    between = all(t.stride(0) * t.element_size() % 16 == 0 for t in tensors)
    return aligned(*(t[0] for t in tensors)) and between and (one_matrix or not target.descriptors)


def tiled_matrices(tensor: Tensor, block: list[int], described: bool) -> Tensor | TensorDescriptor:
    """Return the tensor (E, N, K), or the descriptor of its E * N rows for tiles of ``block``."""
    return tiled(tensor.view(-1, tensor.shape[2]), block, True) if described else tensor


def rows_as_experts(offsets: Tensor, rows: int) -> Tensor:
    """Return the expert of each row, (rows,); E for rows of no expert."""
    ends = offsets.clamp(0, rows).cummax(0).values
    return torch.searchsorted(ends, torch.arange(rows, dtype=ends.dtype, device=ends.device), right=True)
