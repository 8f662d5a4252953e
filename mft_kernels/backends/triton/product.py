"""The masked product: out = a @ Wm.T (forward) or a @ Wm (d_x), Wm = where(keep, weight, 0), never in memory.

    forward   out (M, N) = x           (M, K) @ Wm.T     P = N, Q = K
    d_x       out (M, K) = grad_output (M, N) @ Wm       P = K, Q = N

P is the axis of the result that comes from the weight, Q the one that is summed. One program takes tiles of
BLOCK_M x BLOCK_P, and for each walks along Q:

             Q ->                          weight and scores, BLOCK_Q at a time:
        +---+---+---+                      select, then multiply
      M | a | a | a |   x   [Wm][Wm][Wm]   = one tile of out
        +---+---+---+
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...operands import Keep
from .arguments import aligned, arithmetic, describable, operands, tiled
from .launch import launch
from .plan import MOST_SPLITS, Problem, Tiles, product_tiles
from .target import target_of
from .tiles import grouped, is_kept, load_bits, load_thresholds, load_tile, store_tile


@triton.jit
def product_tile(
    a, weight, keep, thresholds, row, column, start, stop, M, N, K, origin,
    stride_am, stride_aq, stride_wn, stride_wk, stride_kn, stride_kk, stride_t,
    TRANSPOSED: tl.constexpr, MODE: tl.constexpr, BY_ROW: tl.constexpr, DESCRIPTORS: tl.constexpr,
    MASK_ON_A: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Return a tile (BLOCK_M, BLOCK_P) in fp32 of a @ Wm.T, or a @ Wm if TRANSPOSED, summed over Q from start to stop.

    origin: the row at which the matrix begins in weight and scores. A pointer to packed words is already there.
    """
    Q = N if TRANSPOSED else K
    ROWS: tl.constexpr = BLOCK_Q if TRANSPOSED else BLOCK_P
    COLUMNS: tl.constexpr = BLOCK_P if TRANSPOSED else BLOCK_Q
    if MASK_ON_A:
        sums = tl.zeros((BLOCK_P, BLOCK_M), tl.float32)
    else:
        sums = tl.zeros((BLOCK_M, BLOCK_P), tl.float32)
    if MODE != "packed":
        if TRANSPOSED:
            threshold = load_thresholds(thresholds, 0, N, 0, BLOCK_Q)
        else:
            threshold = load_thresholds(thresholds, column, N, stride_t, BLOCK_P)
    for q in tl.range(start, stop, BLOCK_Q, num_stages=STAGES):
        tile = load_tile(a, row, q, M, Q, stride_am, stride_aq, BLOCK_M, BLOCK_Q, DESCRIPTORS)
        # The weight's tile as it lies in memory: rows of N, columns of K.
        n = q if TRANSPOSED else column
        k = column if TRANSPOSED else q
        w = load_tile(weight, origin + n, k, N, K, stride_wn, stride_wk, ROWS, COLUMNS, DESCRIPTORS)
        if MODE == "packed":
            kept = load_bits(keep, n, k, N, K, stride_kn, ROWS, COLUMNS)
        else:
            scores = load_tile(keep, origin + n, k, N, K, stride_kn, stride_kk, ROWS, COLUMNS, DESCRIPTORS)
            if TRANSPOSED and BY_ROW:
                threshold = load_thresholds(thresholds, n, N, stride_t, BLOCK_Q)
            kept = is_kept(scores, threshold, MODE)
        masked = tl.where(kept, w, 0.0)
        if UPCAST:  # the interpreter's dot multiplies the bits of bf16; fp32 products of bf16 are exact
            tile = tile.to(tl.float32)
            masked = masked.to(tl.float32)
        if MASK_ON_A:
            if TRANSPOSED:
                masked = masked.T
            sums = tl.dot(masked, tile.T, sums, input_precision=PRECISION)
        else:
            if not TRANSPOSED:
                masked = masked.T
            sums = tl.dot(tile, masked, sums, input_precision=PRECISION)
    if MASK_ON_A:
        sums = sums.T
    return sums


@triton.jit(do_not_specialize=["M", "SPLITS"])  # one binary per tile size for any number of tokens
def _masked_product_kernel(
    a, weight, keep, thresholds, bias, out, parts, M, N, K, SPLITS, Q_SPLIT,
    stride_am, stride_aq, stride_wn, stride_wk, stride_kn, stride_kk, stride_t, stride_om, stride_op,
    TRANSPOSED: tl.constexpr, MODE: tl.constexpr, BY_ROW: tl.constexpr, DESCRIPTORS: tl.constexpr,
    MASK_ON_A: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr, GROUP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Write out (M, P) if SPLITS is 1; otherwise parts (SPLITS, M, P) in fp32, whose sum gets the bias later."""
    P = K if TRANSPOSED else N
    Q = N if TRANSPOSED else K
    tl.assume(Q > 0)  # the loop runs at least once; otherwise the first HGMMA waits for its accumulator (ptxas C7515)
    tl.assume(Q_SPLIT > 0)
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_p = tl.cdiv(P, BLOCK_P)
    tiles = tiles_m * tiles_p
    for job in tl.range(tl.program_id(0), tiles * SPLITS, tl.num_programs(0)):
        split = job // tiles
        tile_p, tile_m = grouped(job % tiles, tiles_p, tiles_m, GROUP)
        row = tile_m * BLOCK_M
        column = tile_p * BLOCK_P
        start = split * Q_SPLIT
        sums = product_tile(
            a, weight, keep, thresholds, row, column, start, min(start + Q_SPLIT, Q), M, N, K, 0,
            stride_am, stride_aq, stride_wn, stride_wk, stride_kn, stride_kk, stride_t,
            TRANSPOSED, MODE, BY_ROW, DESCRIPTORS, MASK_ON_A, PRECISION, UPCAST, BLOCK_M, BLOCK_P, BLOCK_Q, STAGES,
        )  # fmt: skip
        store_product(out, parts, split, SPLITS, sums, bias, row, column, M, P, stride_om, stride_op, BLOCK_M, BLOCK_P)


@triton.jit
def store_product(
    out, parts, split, SPLITS, sums, bias, row, column, M, P, stride_om, stride_op,
    BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Store a tile of out (M, P) with the bias if SPLITS is 1; otherwise a tile of a part, without the bias."""
    if bias is not None:
        p = column + tl.arange(0, BLOCK_P)
        sums += tl.load(bias + p, mask=p < tl.where(SPLITS == 1, P, 0), other=0).to(tl.float32)[None, :]
    if SPLITS == 1:
        store_tile(out, sums, row, column, M, P, stride_om, stride_op, BLOCK_M, BLOCK_P)
    else:
        store_part(parts, split, sums, row, column, M, P, BLOCK_M, BLOCK_P)


@triton.jit
def store_part(parts, split, sums, row, column, M, P, BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr):
    """Store a tile of one of the parts (splits, M, P).

    The stride is computed here, because as an argument it would be specialised.
    """
    store_tile(parts + split.to(tl.int64) * M * P, sums, row, column, M, P, P, 1, BLOCK_M, BLOCK_P)


@triton.jit(do_not_specialize=["M", "SPLITS"])  # one binary for any number of tokens and parts
def _sum_splits_kernel(parts, bias, out, M, P, SPLITS, MOST: tl.constexpr, BLOCK: tl.constexpr):
    """Write out (M, P) = sum of parts (SPLITS, M, P), always in the same order, + bias.

    The loop runs to MOST, so that all loads are in flight at once. Parts beyond SPLITS are not read and add 0.
    """
    size = tl.full((), 1, tl.int64) * M * P  # M may be the constant 1, which has no dtype
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = element < size
    total = tl.zeros((BLOCK,), tl.float32)
    for split in tl.static_range(MOST):
        there = element < tl.where(SPLITS > split, size, 0)  # noqa: SIM300  the constexpr must be on the right
        total += tl.load(parts + split * size + element, mask=there, other=0)
    if bias is not None:
        total += tl.load(bias + element % P, mask=inside, other=0).to(tl.float32)
    tl.store(out + element, total.to(out.dtype.element_ty), mask=inside)


def fused_product(a: Tensor, weight: Tensor, keep: Keep, bias: Tensor | None, transposed: bool) -> Tensor:
    """Compute a (M, Q) -> (M, P): a @ Wm.T + bias, or a @ Wm if transposed. No axis may be empty."""
    (n, k), m, target = weight.shape, a.shape[0], target_of(a.device)
    p, q = (k, n) if transposed else (n, k)
    out = a.new_empty((m, p))
    bias = None if bias is None else bias.contiguous()
    given = operands(weight, keep, aligned(a, weight, *keep.tiled))
    described = describable(target, given)
    tiles = product_tiles(Problem(target, m, p, q, given))
    split = Split.of(tiles, out, q)
    tiles_of_all = math.ceil(m / tiles.rows) * math.ceil(p / tiles.columns) * split.splits
    weight_block = [tiles.inner, tiles.columns] if transposed else [tiles.columns, tiles.inner]
    launch(
        _masked_product_kernel,
        (min(tiles.blocks * target.multiprocessors, tiles_of_all),),
        tiled(a, [tiles.rows, tiles.inner], described),
        tiled(weight, weight_block, described),
        tiled(keep.source, weight_block, described and keep.mode != "packed"),
        keep.thresholds,
        bias,
        out,
        split.parts,
        m,
        n,
        k,
        split.splits,
        split.part,
        *a.stride(),
        *weight.stride(),
        *keep.source.stride(),
        keep.threshold_stride,
        *out.stride(),
        TRANSPOSED=transposed,
        MASK_ON_A=target.swapped and not tiles.plain,
        MODE=keep.mode,
        BY_ROW=keep.by_row,
        DESCRIPTORS=described,
        GROUP=tiles.group,
        **tiles.options("MPQ"),
        **arithmetic(weight),
    )
    split.add_up(bias, out)
    return out


class Split(NamedTuple):
    """A sum along Q in ``splits`` splits, each of ``part`` elements of the axis. The last one may have fewer."""

    part: int
    splits: int
    parts: Tensor  # (splits, M, P) in fp32; empty if the sum is not split

    @classmethod
    def of(cls, tiles: Tiles, out: Tensor, q: int) -> "Split":
        """Return the split that the tiles ask for, with parts that add up to out (M, P)."""
        part = max(tiles.inner, tiles.part(q))
        splits = max(1, math.ceil(q / part))
        return cls(part, splits, out.new_empty((splits if splits > 1 else 0, *out.shape), dtype=torch.float32))

    def add_up(self, bias: Tensor | None, out: Tensor) -> None:
        """Write out (M, P) = sum of the parts + bias, if there are several parts."""
        if self.splits == 1 or out.numel() == 0:
            return
        block = 512  # 4 elements per thread; with 8, sixteen loads in flight spill
        grid = (triton.cdiv(out.numel(), block),)
        operands = (self.parts, bias, out, *out.shape, self.splits)
        launch(_sum_splits_kernel, grid, *operands, MOST=MOST_SPLITS, BLOCK=block, num_warps=4, maxnreg=96)
