"""Device functions that the matrix kernels share: tiles in and out, what is kept, the order of tiles.

A tile is read through a TMA descriptor if the launcher made one, otherwise through pointers and strides; a constexpr
says which. Offsets are int64 before they are multiplied, and both axes are masked.
"""

import triton
import triton.language as tl


@triton.jit
def load_tile(
    source, row, column, rows, columns, stride_row, stride_column,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DESCRIPTOR: tl.constexpr,
):  # fmt: skip
    """Return (ROWS, COLUMNS) of a (rows, columns) matrix from (row, column) on; 0 beyond its edges."""
    if DESCRIPTOR:
        tile = source.load([row, column])
    else:
        r = row + tl.arange(0, ROWS)
        c = column + tl.arange(0, COLUMNS)
        offsets = r.to(tl.int64)[:, None] * stride_row + c.to(tl.int64)[None, :] * stride_column
        tile = tl.load(source + offsets, mask=(r < rows)[:, None] & (c < columns)[None, :], other=0)
    return tile


@triton.jit
def store_tile(
    target, tile, row, column, rows, columns, stride_row, stride_column,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Store the tile, cast to the target's dtype, in a (rows, columns) matrix from (row, column) on."""
    r = row + tl.arange(0, ROWS)
    c = column + tl.arange(0, COLUMNS)
    offsets = r.to(tl.int64)[:, None] * stride_row + c.to(tl.int64)[None, :] * stride_column
    tl.store(target + offsets, tile.to(target.dtype.element_ty), mask=(r < rows)[:, None] & (c < columns)[None, :])


@triton.jit
def load_bits(
    words, row, column, rows, columns, stride_row,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Return (ROWS, COLUMNS) booleans from int32 words of 32 columns; ``column`` and COLUMNS are multiples of 32."""
    return spread(load_words(words, row, column, rows, columns, stride_row, ROWS, COLUMNS), ROWS, COLUMNS)


@triton.jit
def load_words(
    words, row, column, rows, columns, stride_row,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Return int32 words (ROWS, COLUMNS / 32), 0 beyond the edges. If ``rows`` is 0, none is loaded."""
    r = row + tl.arange(0, ROWS)
    c = column // 32 + tl.arange(0, COLUMNS // 32)
    inside = (r < rows)[:, None] & (c < tl.cdiv(columns, 32))[None, :]
    return tl.load(words + r.to(tl.int64)[:, None] * stride_row + c[None, :], mask=inside, other=0)


@triton.jit
def spread(words, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return the bits of words (ROWS, COLUMNS / 32) as (ROWS, COLUMNS) booleans.

    Each thread loads one word, and a reshape spreads it. Loading the word of every element instead takes 96 copies,
    compared with 3, and spills (sm_90, 128 x 64).
    """
    bits = (words[:, :, None] >> tl.arange(0, 32)[None, None, :]) & 1
    return bits.reshape(ROWS, COLUMNS) != 0


@triton.jit
def load_thresholds(thresholds, row, rows, stride, ROWS: tl.constexpr):
    """Return the threshold of each row, (ROWS, 1). Stride 0 repeats that of the matrix.

    Each row loads its own threshold, even if all are equal. A scalar that is broadcast over the tile would make every
    HGMMA of the loop wait for its operand (ptxas C7515), and thresholds per row then cost nothing more. Beyond the edge
    the threshold is NaN, so nothing is kept.
    """
    r = row + tl.arange(0, ROWS)
    return tl.load(thresholds + r.to(tl.int64) * stride, mask=r < rows, other=float("nan")).to(tl.float32)[:, None]


@triton.jit
def is_kept(scores, threshold, MODE: tl.constexpr):
    """Return |scores| >= threshold, or scores >= threshold. NaN is dropped. fp32 holds every 16-bit score exactly."""
    key = scores.to(tl.float32)
    if MODE == "magnitude":
        key = tl.abs(key)
    return key >= threshold


@triton.jit
def store_kept(
    out, values, keep, thresholds, row, column, N, K, stride_kn, stride_kk, stride_t,
    MODE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Store one tile of out (N, K), contiguous: the values that the mask keeps, and 0 elsewhere."""
    if MODE == "packed":
        kept = load_bits(keep, row, column, N, K, stride_kn, BLOCK_N, BLOCK_K)
    else:
        scores = load_tile(keep, row, column, N, K, stride_kn, stride_kk, BLOCK_N, BLOCK_K, False)
        kept = is_kept(scores, load_thresholds(thresholds, row, N, stride_t, BLOCK_N), MODE)
    store_tile(out, tl.where(kept, values, 0.0), row, column, N, K, K, 1, BLOCK_N, BLOCK_K)


@triton.jit
def grouped(tile, tiles_slow, tiles_fast, GROUP: tl.constexpr):
    """Return the (slow, fast) index of a tile: GROUP slow ones in turn for each fast one, so both operands stay in L2.

    slow 0 | 0 2 4 ..        with GROUP = 2
    slow 1 | 1 3 5 ..
    """
    in_group = GROUP * tiles_fast
    first = tile // in_group * GROUP
    size = min(tiles_slow - first, GROUP)
    within = tile % in_group
    return first + within % size, within // size
