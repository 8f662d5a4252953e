"""The ops over experts, each in one launch for any distribution of rows over experts; see experts.py.

    product      out (T, P): the rows of expert e are a @ Wm[e].T (P = N) or a @ Wm[e] (P = K); rows of no expert are 0
    score_grad   out (E, N, K): [out[e] +] (grad.T @ x over the rows of e) [* weight[e]] [* sign[e]]

A tile of the product belongs to one expert, whose last tile may have fewer rows than BLOCK_M. No sum is split, because
E small products fill a card sooner than one does. No tile size was measured on a GPU.
"""

import math

import triton
import triton.language as tl
from torch import Tensor

from ...operands import Experts, Keep, Sums
from .arguments import aligned, arithmetic, describable, operands, sign_kind, strides, tiled
from .experts import block_of, expert_of, readable, rows_as_experts, rows_each, rows_of_experts, tiled_matrices
from .launch import launch
from .plan import EPILOGUE_COLUMNS, Problem, outer_tiles, product_tiles
from .product import product_tile
from .score_grad import gradients_of_tile
from .target import target_of
from .tiles import grouped, store_tile


def product_of_experts(a: Tensor, weight: Experts, keep: Keep, bias: Tensor | None, transposed: bool) -> Tensor:
    """Compute the product of each expert's rows; rows of no expert are 0."""
    matrices, offsets, thresholds = weight.matrices, weight.offsets, keep.thresholds
    source = keep.source.contiguous() if thresholds is None else keep.source
    keep = Keep(source, None if thresholds is None else thresholds.contiguous(), keep.mode)
    (experts, n, k), rows, target = matrices.shape, len(a), target_of(a.device)
    p, q = (k, n) if transposed else (n, k)
    if rows == 0 or p == 0 or experts == 0:
        return a.new_zeros(rows, p)
    if q == 0:  # only the bias, if any
        y = a.new_zeros(experts + 1, p)
        if bias is not None:
            y[:-1] = bias
        return y[rows_as_experts(offsets, rows)]
    out = a.new_empty((rows, p))
    given = operands(matrices, keep, aligned(a) and readable(target, matrices, *keep.tiled))
    described = describable(target, given)
    busy, each = rows_each(rows, experts)
    tiles = product_tiles(Problem(target, each, p, q, given, busy))
    block = [tiles.inner, tiles.columns] if transposed else [tiles.columns, tiles.inner]
    most = (rows // tiles.rows + busy) * math.ceil(p / tiles.columns)
    launch(
        _grouped_product_kernel,
        (min(tiles.blocks * target.multiprocessors, most),),
        tiled(a, [tiles.rows, tiles.inner], described),
        tiled_matrices(matrices, block, described),
        tiled_matrices(keep.source, block, described and keep.mode != "packed"),
        keep.thresholds,
        None if bias is None else bias.contiguous(),
        out,
        offsets.contiguous(),
        rows,
        experts,
        n,
        k,
        *a.stride(),
        *matrices.stride(),
        *keep.source.stride(),
        TRANSPOSED=transposed,
        MASK_ON_A=target.swapped and not tiles.plain,
        MODE=keep.mode,
        DESCRIPTORS=described,
        BLOCK_E=block_of(experts),
        GROUP=tiles.group,
        **tiles.options("MPQ"),
        **arithmetic(matrices),
    )
    return out


@triton.jit(do_not_specialize=["T", "E"])  # one binary per tile size for any number of rows
def _grouped_product_kernel(
    a, weight, keep, thresholds, bias, out, offsets, T, E, N, K,
    stride_am, stride_aq, stride_we, stride_wn, stride_wk, stride_ke, stride_kn, stride_kk,
    TRANSPOSED: tl.constexpr, MODE: tl.constexpr, DESCRIPTORS: tl.constexpr,
    MASK_ON_A: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr, GROUP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Write out (T, P)."""
    P = K if TRANSPOSED else N
    Q = N if TRANSPOSED else K
    tl.assume(Q > 0)  # see _masked_product_kernel
    tiles_p = tl.cdiv(P, BLOCK_P)
    begins, ends = rows_of_experts(offsets, T, E, BLOCK_E)
    jobs = tl.cdiv(ends - begins, BLOCK_M) * tiles_p
    last = tl.cumsum(jobs, 0)
    for job in tl.range(tl.program_id(0), tl.sum(jobs, 0), tl.num_programs(0)):
        expert, begin, end, first = expert_of(job, begins, ends, jobs, last, BLOCK_E)
        tile_p, tile_m = grouped(job - first, tiles_p, tl.cdiv(end - begin, BLOCK_M), GROUP)
        row = begin + tile_m * BLOCK_M
        column = tile_p * BLOCK_P
        w = weight
        origin = 0
        if DESCRIPTORS:
            origin = expert * N
        else:
            w = weight + expert.to(tl.int64) * stride_we
        k = keep
        if MODE == "packed" or not DESCRIPTORS:
            k = keep + expert.to(tl.int64) * stride_ke
        t = thresholds
        if MODE != "packed":
            t = thresholds + expert
        # BY_ROW with descriptors: beyond row N, a descriptor reads the next expert's rows. Thresholds per row drop
        # them, because they are NaN there.
        sums = product_tile(
            a, w, k, t, row, column, 0, Q, end, N, K, origin,
            stride_am, stride_aq, stride_wn, stride_wk, stride_kn, stride_kk, 0,
            TRANSPOSED, MODE, DESCRIPTORS, DESCRIPTORS, MASK_ON_A, PRECISION, UPCAST, BLOCK_M, BLOCK_P, BLOCK_Q, STAGES,
        )  # fmt: skip
        if bias is not None:
            p = column + tl.arange(0, BLOCK_P)
            added = tl.load(bias + expert.to(tl.int64) * P + p, mask=p < P, other=0)
            sums += added.to(tl.float32)[None, :]
        store_tile(out, sums, row, column, end, P, P, 1, BLOCK_M, BLOCK_P)
    nobodys = tl.max(ends, 0)
    for tile in tl.range(tl.program_id(0), tl.cdiv(T - nobodys, BLOCK_M) * tiles_p, tl.num_programs(0)):
        zeros = tl.zeros((BLOCK_M, BLOCK_P), tl.float32)
        row = nobodys + tile // tiles_p * BLOCK_M
        store_tile(out, zeros, row, tile % tiles_p * BLOCK_P, T, P, P, 1, BLOCK_M, BLOCK_P)


def score_grad_of_experts(sums: Sums) -> None:
    """Write d_scores[e] = [d_scores[e] +] (grad_output.T @ x over the rows of e) [* weight[e]] [* sign[e]].

    For an expert without rows, d_scores[e] is exactly 0, or stays as it is if sums are accumulated.
    """
    grad_output, x, weight, sign, out, accumulate, offsets, *_ = sums
    assert out is not None
    assert offsets is not None
    (experts, n, k), rows = out.shape, len(x)
    if rows == 0 or out.numel() == 0:
        if not accumulate:
            out.zero_()
        return
    target = target_of(x.device)
    # No descriptors: they read beyond an expert's rows, which would then have to be masked in both operands.
    given = operands(x, None, aligned(grad_output, x))
    busy, each = rows_each(rows, experts)
    tiles = outer_tiles(Problem(target, each, n, k, given, busy))
    of_each = math.ceil(n / tiles.rows) * math.ceil(k / tiles.columns)
    launch(
        _grouped_score_grad_kernel,
        (min(tiles.blocks * target.multiprocessors, (busy if accumulate else experts) * of_each),),
        grad_output,
        x,
        offsets.contiguous(),
        weight,
        sign,
        out,
        rows,
        experts,
        n,
        k,
        *grad_output.stride(),
        *x.stride(),
        *strides(weight, 3),
        *strides(sign, 3),
        SIGN=sign_kind(sign),
        ACCUMULATE=accumulate,
        BLOCK_E=block_of(experts),
        GROUP=tiles.group,
        PIECES=tiles.columns // EPILOGUE_COLUMNS,
        **tiles.options("NKM"),
        **arithmetic(x),
    )


@triton.jit(do_not_specialize=["T", "E"])
def _grouped_score_grad_kernel(
    grad, x, offsets, weight, signs, out, T, E, N, K, stride_gm, stride_gn, stride_xm, stride_xk,
    stride_we, stride_wn, stride_wk, stride_se, stride_sn, stride_sk,
    SIGN: tl.constexpr, ACCUMULATE: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr, GROUP: tl.constexpr,
    STAGES: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """Compute one tile of one expert's matrix per job. If ACCUMULATE, only experts that have rows have jobs."""
    tiles_n = tl.cdiv(N, BLOCK_N)
    tiles_k = tl.cdiv(K, BLOCK_K)
    begins, ends = rows_of_experts(offsets, T, E, BLOCK_E)
    if ACCUMULATE:
        asked = ends > begins
    else:
        asked = tl.arange(0, BLOCK_E) < E
    jobs = asked.to(tl.int32) * tiles_n * tiles_k
    last = tl.cumsum(jobs, 0)
    for job in tl.range(tl.program_id(0), tl.sum(jobs, 0), tl.num_programs(0)):
        expert, begin, end, first = expert_of(job, begins, ends, jobs, last, BLOCK_E)
        tile_n, tile_k = grouped(job - first, tiles_n, tiles_k, GROUP)
        row = tile_n * BLOCK_N
        column = tile_k * BLOCK_K
        rows = end - begin
        g = grad + begin.to(tl.int64) * stride_gm
        b = x + begin.to(tl.int64) * stride_xm
        w = weight
        if weight is not None:
            w = weight + expert.to(tl.int64) * stride_we
        s = signs
        if signs is not None:
            s = signs + expert.to(tl.int64) * stride_se
        o = out + expert.to(tl.int64) * N * K
        if rows > 0:
            gradients_of_tile(
                g, b, w, None, None, s, o, None, row, column, rows, N, K,
                stride_gm, stride_gn, stride_xm, stride_xk, stride_wn, stride_wk, 0, 0, 0, stride_sn, stride_sk,
                SIGN, "packed", ACCUMULATE, False, PRECISION, UPCAST, BLOCK_N, BLOCK_K, BLOCK_M, STAGES, PIECES,
            )  # fmt: skip
        elif not ACCUMULATE:
            store_tile(o, tl.zeros((BLOCK_N, BLOCK_K), tl.float32), row, column, N, K, K, 1, BLOCK_N, BLOCK_K)
