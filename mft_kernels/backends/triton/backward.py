"""d_x and d_scores in one launch, for few tokens, where both are bound by reading weight and scores.

The grid walks strips of BLOCK_K columns of the weight. A strip's jobs are its tiles of d_x, each of which walks down
the strip, and its tiles of d_scores, one per block of rows:

              strip                       tokens |  memory in units of one weight matrix, 16-bit scores
        +-------+-------+---
        | d_s   |       |                 two launches   weight, scores; weight, scores, d_scores    5
      N | d_s   |       |                 one launch     weight, scores once from memory, once       3
        | d_s   |       |                                from L2 (2 MiB per strip at N = 4096)
        +-------+-------+---
    M   | d_x   |       |                 Tiles of one kind wait for memory while the others multiply. With up to 64
        +-------+-------+---              tokens, two programs share a multiprocessor of sm_90 (not with fp32 scores).

If the tensor cores bound both products, there is nothing to share, and two launches give each product its best tile.
The number of tokens from which that holds depends on the layer and the card; plan.one_launch asks the card's model.
"""

import math

import triton
import triton.language as tl
from torch import Tensor

from ...operands import Sums
from .arguments import aligned, arithmetic, describable, operands, sign_kind, strides, tiled
from .launch import launch
from .plan import EPILOGUE_COLUMNS, Problem, backward_tiles
from .product import Split, product_tile, store_part
from .score_grad import gradients_of_tile
from .target import target_of
from .tiles import store_tile


@triton.jit(do_not_specialize=["M", "SPLITS"])  # two binaries per tile size for any number of tokens and parts
def _backward_kernel(
    grad_rows, grad_columns, x, weight_tiles, keep_tiles, weight, keep, thresholds, signs, d_x, parts, d_scores,
    d_weight, M, N, K, SPLITS, N_SPLIT, stride_gm, stride_gn, stride_xm, stride_xk, stride_wn, stride_wk,
    stride_kn, stride_kk, stride_t, stride_sn, stride_sk,
    SIGN: tl.constexpr, MODE: tl.constexpr, BY_ROW: tl.constexpr,
    DESCRIPTORS: tl.constexpr, MASK_ON_A: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_S: tl.constexpr,
    WHOLE: tl.constexpr, STAGES: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """Compute tiles of d_x and of d_scores.

    A tile of d_x is BLOCK_M x BLOCK_K, summed over N / SPLITS, BLOCK_Q rows of N at a time. A tile of d_scores is
    BLOCK_N x BLOCK_K, summed over M, BLOCK_S tokens at a time.

    WHOLE: SPLITS is 1. It is a constexpr, because a kernel with both ways of storing d_x spills if two programs share a
    multiprocessor of sm_90.
    """
    tl.assume(M > 0)
    tl.assume(N_SPLIT > 0)
    tiles_m = tl.cdiv(M, BLOCK_M)
    products = tiles_m * SPLITS
    jobs = products + tl.cdiv(N, BLOCK_N)
    for job in tl.range(tl.program_id(0), tl.cdiv(K, BLOCK_K) * jobs, tl.num_programs(0)):
        column = job // jobs * BLOCK_K
        within = job % jobs
        if within < products:  # the longer jobs first
            split = within // tiles_m
            token = within % tiles_m * BLOCK_M
            start = split * N_SPLIT
            product = product_tile(
                grad_rows, weight_tiles, keep_tiles, thresholds, token, column, start, min(start + N_SPLIT, N), M, N, K,
                0,                 stride_gm, stride_gn, stride_wn, stride_wk, stride_kn, stride_kk, stride_t,
                True, MODE, BY_ROW, DESCRIPTORS, MASK_ON_A, PRECISION, UPCAST, BLOCK_M, BLOCK_K, BLOCK_Q, STAGES,
            )  # fmt: skip
            if WHOLE:
                store_tile(d_x, product, token, column, M, K, K, 1, BLOCK_M, BLOCK_K)
            else:
                store_part(parts, split, product, token, column, M, K, BLOCK_M, BLOCK_K)
        else:
            row = (within - products) * BLOCK_N
            gradients_of_tile(
                grad_columns, x, weight, keep, thresholds, signs, d_scores, d_weight, row, column, M, N, K,
                stride_gm, stride_gn, stride_xm, stride_xk, stride_wn, stride_wk,
                stride_kn, stride_kk, stride_t, stride_sn, stride_sk, SIGN, MODE, False,
                DESCRIPTORS, PRECISION, UPCAST, BLOCK_N, BLOCK_K, BLOCK_S, STAGES, PIECES,
            )  # fmt: skip


def both(sums: Sums) -> Tensor:
    """Fill d_scores (and d_weight), (N, K) contiguous, and return d_x (M, K). No axis may be empty."""
    grad, x, weight, sign, d_scores, _, _, d_weight, keep = sums
    assert weight is not None
    assert keep is not None
    (n, k), m, target = weight.shape, grad.shape[0], target_of(x.device)
    given = operands(weight, keep, aligned(grad, x, weight, *keep.tiled))
    described = describable(target, given)
    tiles = backward_tiles(Problem(target, m, n, k, given), weight_grad=d_weight is not None)
    d_x = grad.new_empty((m, k))
    split = Split.of(tiles, d_x, n)
    tokens = min(tiles.inner, max(16, tiles.rows))  # per step of the sum over M
    weight_block = [tiles.inner, tiles.columns]
    jobs = math.ceil(k / tiles.columns) * (math.ceil(m / tiles.rows) * split.splits + math.ceil(n / tiles.columns))
    launch(
        _backward_kernel,
        (min(tiles.blocks * target.multiprocessors, jobs),),
        tiled(grad, [tiles.rows, tiles.inner], described),
        tiled(grad, [tokens, tiles.columns], described),
        tiled(x, [tokens, tiles.columns], described),
        tiled(weight, weight_block, described),
        tiled(keep.source, weight_block, described and keep.mode != "packed"),
        weight,
        keep.source,
        keep.thresholds,
        sign,
        d_x,
        split.parts,
        d_scores,
        d_weight,
        m,
        n,
        k,
        split.splits,
        split.part,
        *grad.stride(),
        *x.stride(),
        *weight.stride(),
        *keep.source.stride(),
        keep.threshold_stride,
        *strides(sign),
        SIGN=sign_kind(sign),
        MODE=keep.mode,
        BY_ROW=keep.by_row,
        MASK_ON_A=target.swapped,
        DESCRIPTORS=described,
        BLOCK_N=tiles.columns,
        BLOCK_S=tokens,
        WHOLE=split.splits == 1,
        PIECES=tiles.columns // EPILOGUE_COLUMNS,
        **tiles.options("MKQ"),
        **arithmetic(weight),
    )
    split.add_up(None, d_x)
    return d_x
