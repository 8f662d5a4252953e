"""d_scores = (grad_output.T @ x) [* weight] [* sign(scores)] and d_weight = where(keep, grad_output.T @ x, 0).

grad_output (M, N), x (M, K) -> (N, K). One program takes tiles of BLOCK_N x BLOCK_K and sums over M:

       M ->                    K                      the epilogue multiplies by weight and sign while the
    +----+----+             +-----+                   sums are in registers, so that grad_output.T @ x is
  N | gT | gT |   x   M     | x   |                   never written to memory
    +----+----+             | x   |
"""

import math

import triton
import triton.language as tl

from ...operands import Sums
from ...reference import functions as reference
from .arguments import aligned, arithmetic, describable, operands, sign_kind, strides, tiled
from .launch import launch
from .plan import EPILOGUE_COLUMNS, Problem, outer_tiles
from .target import target_of
from .tiles import grouped, load_bits, load_tile, store_kept, store_tile


@triton.jit
def store_score_grad(
    sums, weight, signs, d_scores, row, column, N, K,
    stride_wn, stride_wk, stride_sn, stride_sk,
    SIGN: tl.constexpr, ACCUMULATE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Store one tile of d_scores (N, K), contiguous, from its sums.

    SIGN: where the sign comes from, "scores", "bits" or "none". If weight is None, the sums are not multiplied by it.
    """
    value = sums
    if weight is not None:
        w = load_tile(weight, row, column, N, K, stride_wn, stride_wk, BLOCK_N, BLOCK_K, False)
        value = sums * w.to(tl.float32)
    if SIGN == "bits":
        positive = load_bits(signs, row, column, N, K, stride_sn, BLOCK_N, BLOCK_K)
        value = tl.where(positive, value, -value)
    elif SIGN == "scores":
        s = load_tile(signs, row, column, N, K, stride_sn, stride_sk, BLOCK_N, BLOCK_K, False).to(tl.float32)
        # times 0, not 0: NaN must stay. A product by the sign would take up to 30 registers more (sm_90).
        value = tl.where(s > 0, value, tl.where(s < 0, -value, value * 0.0))
    if ACCUMULATE:
        value += load_tile(d_scores, row, column, N, K, K, 1, BLOCK_N, BLOCK_K, False).to(tl.float32)
    store_tile(d_scores, value, row, column, N, K, K, 1, BLOCK_N, BLOCK_K)


@triton.jit
def gradients_of_tile(
    grad, x, weight, keep, thresholds, signs, d_scores, d_weight, row, column, M, N, K,
    stride_gm, stride_gn, stride_xm, stride_xk, stride_wn, stride_wk,
    stride_kn, stride_kk, stride_t, stride_sn, stride_sk,
    SIGN: tl.constexpr, MODE: tl.constexpr, ACCUMULATE: tl.constexpr,
    DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr, STAGES: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """Compute and store one tile of d_scores and d_weight (N, K), each unless it is None."""
    sums = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for m in tl.range(0, M, BLOCK_M, num_stages=STAGES):
        g = load_tile(grad, m, row, M, N, stride_gm, stride_gn, BLOCK_M, BLOCK_N, DESCRIPTORS)
        b = load_tile(x, m, column, M, K, stride_xm, stride_xk, BLOCK_M, BLOCK_K, DESCRIPTORS)
        if UPCAST:
            g = g.to(tl.float32)
            b = b.to(tl.float32)
        sums = tl.dot(g.T, b, sums, input_precision=PRECISION)
    store_gradients(
        sums, weight, keep, thresholds, signs, d_scores, d_weight, row, column, N, K,
        stride_wn, stride_wk, stride_kn, stride_kk, stride_t, stride_sn, stride_sk,
        SIGN, MODE, ACCUMULATE, BLOCK_N, BLOCK_K, PIECES,
    )  # fmt: skip


@triton.jit
def store_gradients(
    sums, weight, keep, thresholds, signs, d_scores, d_weight, row, column, N, K,
    stride_wn, stride_wk, stride_kn, stride_kk, stride_t, stride_sn, stride_sk,
    SIGN: tl.constexpr, MODE: tl.constexpr, ACCUMULATE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """Store one tile in PIECES pieces of its columns, so that weight, sign and old sums need few registers."""
    if PIECES == 1:
        if d_scores is not None:
            store_score_grad(
                sums, weight, signs, d_scores, row, column, N, K, stride_wn, stride_wk, stride_sn, stride_sk,
                SIGN, ACCUMULATE, BLOCK_N, BLOCK_K,
            )  # fmt: skip
        if d_weight is not None:
            store_kept(
                d_weight, sums, keep, thresholds, row, column, N, K, stride_kn, stride_kk, stride_t,
                MODE, BLOCK_N, BLOCK_K,
            )  # fmt: skip
    else:
        left, right = sums.reshape(BLOCK_N, 2, BLOCK_K // 2).permute(0, 2, 1).split()
        store_gradients(
            left, weight, keep, thresholds, signs, d_scores, d_weight, row, column, N, K,
            stride_wn, stride_wk, stride_kn, stride_kk, stride_t, stride_sn, stride_sk,
            SIGN, MODE, ACCUMULATE, BLOCK_N, BLOCK_K // 2, PIECES // 2,
        )  # fmt: skip
        store_gradients(
            right, weight, keep, thresholds, signs, d_scores, d_weight, row, column + BLOCK_K // 2, N, K,
            stride_wn, stride_wk, stride_kn, stride_kk, stride_t, stride_sn, stride_sk,
            SIGN, MODE, ACCUMULATE, BLOCK_N, BLOCK_K // 2, PIECES // 2,
        )  # fmt: skip


@triton.jit(do_not_specialize=["M"])  # one binary for any number of tokens
def _score_grad_kernel(
    grad, x, weight, keep, thresholds, signs, d_scores, d_weight, M, N, K,
    stride_gm, stride_gn, stride_xm, stride_xk, stride_wn, stride_wk,
    stride_kn, stride_kk, stride_t, stride_sn, stride_sk,
    SIGN: tl.constexpr, MODE: tl.constexpr, ACCUMULATE: tl.constexpr,
    DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr, GROUP: tl.constexpr, STAGES: tl.constexpr,
    PIECES: tl.constexpr,
):  # fmt: skip
    tl.assume(M > 0)
    tiles_n = tl.cdiv(N, BLOCK_N)
    tiles_k = tl.cdiv(K, BLOCK_K)
    for tile in tl.range(tl.program_id(0), tiles_n * tiles_k, tl.num_programs(0)):
        tile_n, tile_k = grouped(tile, tiles_n, tiles_k, GROUP)
        row = tile_n * BLOCK_N
        column = tile_k * BLOCK_K
        gradients_of_tile(
            grad, x, weight, keep, thresholds, signs, d_scores, d_weight, row, column, M, N, K,
            stride_gm, stride_gn, stride_xm, stride_xk, stride_wn, stride_wk,
            stride_kn, stride_kk, stride_t, stride_sn, stride_sk,
            SIGN, MODE, ACCUMULATE, DESCRIPTORS, PRECISION, UPCAST, BLOCK_N, BLOCK_K, BLOCK_M, STAGES, PIECES,
        )  # fmt: skip


def fill_gradients(sums: Sums) -> None:
    """Fill d_scores and d_weight, each if given. Tokens are (M, N) and (M, K). ``keep`` is read only for d_weight."""
    grad, x, weight, sign, d_scores, accumulate, _, d_weight, keep = sums
    m, n, k = *grad.shape, x.shape[1]
    if n == 0 or k == 0:
        return
    if m == 0:  # sums of 0, whose products with a weight that is not finite are NaN
        reference.score_grad(sums)
        return
    target = target_of(grad.device)
    given = operands(x, None, aligned(grad, x))
    described = describable(target, given)
    tiles = outer_tiles(Problem(target, m, n, k, given))
    launch(
        _score_grad_kernel,
        (min(tiles.blocks * target.multiprocessors, math.ceil(n / tiles.rows) * math.ceil(k / tiles.columns)),),
        tiled(grad, [tiles.inner, tiles.rows], described),
        tiled(x, [tiles.inner, tiles.columns], described),
        weight,
        keep.source if keep else None,
        keep.thresholds if keep else None,
        sign,
        d_scores,
        d_weight,
        m,
        n,
        k,
        *grad.stride(),
        *x.stride(),
        *strides(weight),
        *strides(keep.source if keep else None),
        keep.threshold_stride if keep else 0,
        *strides(sign),
        SIGN=sign_kind(sign),
        MODE=keep.mode if keep else "packed",
        ACCUMULATE=accumulate,
        DESCRIPTORS=described,
        GROUP=tiles.group,
        PIECES=tiles.columns // EPILOGUE_COLUMNS,
        **tiles.options("NKM"),
        **arithmetic(x),
    )
