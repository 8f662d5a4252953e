"""A mask in its weight's own memory: put dropped elements aside, put them back, or write 0. See reference/in_place.py.

weight (N, K), or (E, N, K) for experts, contiguous  ->  one program per row, which moves bits without computing

Dropped elements are stored aside in row-major order. A row's elements begin after those of all rows before it, which a
launch of its own counts. An element's place within its row is a running sum.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.graph import increment_version

from .launch import launch

_BLOCK = 1024  # elements of a row at a time, 8 per thread


def put_aside(weight: Tensor, packed: Tensor, held: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Return a copy of the elements that ``packed`` drops. The host waits for their number.

    ``held``: (aside, mask) if the weight already holds a mask; aside has the elements that it dropped.
    """
    ends = ends_of(weight, packed)
    out = weight.new_empty(int(ends[-1:].sum()))  # 0 without rows
    launch_put_aside(out, weight, packed, ends, None if held is None else (*held, ends_of(weight, held[1])))
    return out


def put_back(weight: Tensor, aside: Tensor, held: Tensor, wanted: Tensor | None = None) -> None:
    """Write ``aside`` to where ``held`` dropped it from, except the elements that ``wanted`` drops too."""
    launch_put_back(weight, aside, held, ends_of(weight, held), wanted)


def drop(weight: Tensor, packed: Tensor, held: Tensor | None = None) -> None:
    """Write +0 where ``packed`` drops. Where ``held`` drops, +0 is already there."""
    _launch_by_row(_drop_kernel, weight, _as_bits(weight), packed, held)
    increment_version(weight)


# ---------------------------------------------------------------------------------------------- below: the launches


def ends_of(weight: Tensor, packed: Tensor) -> Tensor:
    """Return where the dropped elements of each row end among all dropped elements, int64 (rows,)."""
    return count_dropped(weight, packed).cumsum(0, dtype=torch.int64)


def count_dropped(weight: Tensor, packed: Tensor) -> Tensor:
    """Return how many elements of each row are dropped, int32 (rows,)."""
    counts = torch.empty(_grid(weight), dtype=torch.int32, device=weight.device)
    _launch_by_row(_count_kernel, weight, counts, packed)
    return counts


def launch_put_aside(
    out: Tensor, weight: Tensor, packed: Tensor, ends: Tensor, held: tuple[Tensor, Tensor, Tensor] | None = None
) -> None:
    """Fill ``out``. held: (aside, mask, ends of the mask) if the weight already holds a mask."""
    before = (None, None, None) if held is None else (_as_bits(held[0]), *held[1:])
    _launch_by_row(_put_aside_kernel, weight, _as_bits(out), _as_bits(weight), packed, ends, *before)


def launch_put_back(weight: Tensor, aside: Tensor, held: Tensor, ends: Tensor, wanted: Tensor | None) -> None:
    """Put ``aside`` back. ends: those of ``held``."""
    _launch_by_row(_put_back_kernel, weight, _as_bits(weight), _as_bits(aside), held, ends, wanted)
    increment_version(weight)


def _launch_by_row(kernel: Any, weight: Tensor, *arguments: Tensor | None) -> None:
    """Launch one program for each row of the weight."""
    launch(kernel, _grid(weight), *arguments, weight.shape[-1], BLOCK=_BLOCK, num_warps=4)


def _grid(weight: Tensor) -> tuple[int]:
    return (weight.shape[:-1].numel(),)


def _as_bits(values: Tensor) -> Tensor:
    """View values as integers, which are moved unchanged: NaN keeps its payload."""
    return values.view(torch.int32 if values.element_size() == 4 else torch.int16)


@triton.jit
def _dropped(words, row, c, K):
    """Return which of columns ``c`` of a row are dropped. Beyond the row, none are."""
    word = tl.load(words + row.to(tl.int64) * tl.cdiv(K, 32) + c // 32, mask=c < K, other=-1)
    return ((word >> (c % 32)) & 1) == 0


@triton.jit
def _first_place(ends, row):
    """Return where the dropped elements of a row begin."""
    return tl.load(ends + row - 1, mask=row > 0, other=0)


@triton.jit
def _count_kernel(counts, words, K, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    count = 0
    for first in range(0, K, BLOCK):
        count += tl.sum(_dropped(words, row, first + tl.arange(0, BLOCK), K).to(tl.int32), 0)
    tl.store(counts + row, count)


@triton.jit
def _put_aside_kernel(out, weight, words, ends, aside, held, held_ends, K, BLOCK: tl.constexpr):
    """Fill ``out`` from one row. held: a mask that the weight already holds, with its ``aside``; or None."""
    row = tl.program_id(0)
    place = _first_place(ends, row)
    held_place = place
    if held is not None:
        held_place = _first_place(held_ends, row)
    for first in range(0, K, BLOCK):
        c = first + tl.arange(0, BLOCK)
        now = _dropped(words, row, c, K)
        if held is None:
            values = tl.load(weight + row.to(tl.int64) * K + c, mask=now, other=0)
        else:
            before = _dropped(held, row, c, K)
            inside = tl.load(weight + row.to(tl.int64) * K + c, mask=now & (before == 0), other=0)
            places = held_place + tl.cumsum(before.to(tl.int32), 0) - 1
            values = tl.where(before, tl.load(aside + places, mask=now & before, other=0), inside)
            held_place += tl.sum(before.to(tl.int32), 0)
        tl.store(out + place + tl.cumsum(now.to(tl.int32), 0) - 1, values, mask=now)
        place += tl.sum(now.to(tl.int32), 0)


@triton.jit
def _put_back_kernel(weight, aside, held, ends, wanted, K, BLOCK: tl.constexpr):
    """Put one row's elements back. wanted: another mask, whose dropped elements stay as they are; or None."""
    row = tl.program_id(0)
    place = _first_place(ends, row)
    for first in range(0, K, BLOCK):
        c = first + tl.arange(0, BLOCK)
        before = _dropped(held, row, c, K)
        back = before
        if wanted is not None:
            back = before & (_dropped(wanted, row, c, K) == 0)
        values = tl.load(aside + place + tl.cumsum(before.to(tl.int32), 0) - 1, mask=back, other=0)
        tl.store(weight + row.to(tl.int64) * K + c, values, mask=back)
        place += tl.sum(before.to(tl.int32), 0)


@triton.jit
def _drop_kernel(weight, words, held, K, BLOCK: tl.constexpr):
    """Write 0 into one row. held: a mask whose dropped elements are already 0; or None."""
    row = tl.program_id(0)
    for first in range(0, K, BLOCK):
        c = first + tl.arange(0, BLOCK)
        now = _dropped(words, row, c, K)
        if held is not None:
            now = now & (_dropped(held, row, c, K) == 0)
        tl.store(weight + row.to(tl.int64) * K + c, tl.zeros((BLOCK,), weight.dtype.element_ty), mask=now)
