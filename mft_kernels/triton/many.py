"""Many masks on one weight, a mask a row: y[i] = x[i] @ where(masks[tasks[i]], weight, 0).T + bias; -1: all is kept.

    x (M, K), weight (N, K), up to 16 masks (N, ceil(K / 32)), tasks one for every EACH rows

One program makes BLOCK_M x BLOCK_N of y. A tile of the weight is read once, masked by each mask that a row of the
program takes, and multiplied; of a product those rows alone are kept that take its mask. For few tokens, whose products
should cost less than the weight takes to come. No tile size was measured on a GPU.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .arguments import Keep, arithmetic, is_exact
from .language import tl, triton
from .launch import launch
from .product import fused_product
from .target import interpreting
from .tiles import load_bits, load_tile, store_tile


def masked_linear_many(
    x: Tensor, weight: Tensor, masks: Sequence[Tensor], tasks: Tensor, bias: Tensor | None
) -> Tensor:
    """masked_linear_packed with a mask a row, in one launch; NaN for a task that there is not."""
    (n, k), rows = weight.shape, x.shape[:-1].numel()
    y = x.new_empty((rows, n))
    a = x.reshape(rows, k)
    block_m = 16 if rows <= 16 or is_exact(weight) else 32 if rows <= 32 else 64
    block_n, block_k = (32, 32) if interpreting() else (64, 32 if weight.element_size() == 4 else 64)
    launch(
        _many_masks_kernel,
        (triton.cdiv(rows, block_m) * triton.cdiv(n, block_n),),
        a,
        weight,
        tuple(packed.contiguous() for packed in masks),
        tasks.contiguous(),
        bias if bias is None else bias.contiguous(),
        y,
        rows,
        n,
        k,
        max(1, rows // max(1, len(tasks))),
        *a.stride(),
        *weight.stride(),
        *y.stride(),
        COUNT=len(masks),
        HAS_BIAS=bias is not None,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        num_warps=4,
        num_stages=2,
        **arithmetic(weight),
    )
    return y.view(*x.shape[:-1], n)


def masked_linear_many_backward(grad_output: Tensor, weight: Tensor, masks: Sequence[Tensor], tasks: Tensor) -> Tensor:
    """d_x of masked_linear_many: a product of all rows for each mask, of which its rows are taken."""
    (n, k), rows = weight.shape, grad_output.shape[:-1].numel()
    grad, task = grad_output.reshape(rows, n), tasks.repeat_interleave(max(1, rows // max(1, len(tasks)))).unsqueeze(1)
    d_x = grad.new_full((rows, k), torch.nan)
    if 0 not in (rows, n, k):
        every = [torch.full_like(masks[0], -1) if masks else _everything(weight), *masks]
        for place, packed in enumerate(every, start=-1):
            product = fused_product(grad, weight, Keep(packed.contiguous(), None, "packed"), None, True)
            d_x = torch.where(task == place, product, d_x)
    elif n == 0:
        d_x.zero_()
    return d_x.view(*grad_output.shape[:-1], k)


def _everything(weight: Tensor) -> Tensor:
    return weight.new_full((weight.shape[0], -(-weight.shape[1] // 32)), -1, dtype=torch.int32)


@triton.jit(do_not_specialize=["M", "EACH"])
def _many_masks_kernel(
    x, weight, masks, tasks, bias, y, M, N, K, EACH,
    stride_xm, stride_xk, stride_wn, stride_wk, stride_ym, stride_yn,
    COUNT: tl.constexpr, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of y a program."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    row = tl.program_id(0) % tiles_m * BLOCK_M
    column = tl.program_id(0) // tiles_m * BLOCK_N
    m = row + tl.arange(0, BLOCK_M)
    task = tl.load(tasks + m // EACH, mask=m < M, other=-2).to(tl.int32)
    words = tl.cdiv(K, 32)
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in tl.range(0, K, BLOCK_K):
        tile = load_tile(x, row, k, M, K, stride_xm, stride_xk, BLOCK_M, BLOCK_K, False)
        w = load_tile(weight, column, k, N, K, stride_wn, stride_wk, BLOCK_N, BLOCK_K, False)
        if UPCAST:  # see product_tile
            tile = tile.to(tl.float32)
            w = w.to(tl.float32)
        for i in tl.static_range(COUNT + 1):  # the last is the whole weight
            mine = task == (i if i < COUNT else -1)
            if tl.max(mine.to(tl.int32), 0) != 0:
                masked = w
                if i < COUNT:
                    kept = load_bits(masks[i], column, k, N, K, words, BLOCK_N, BLOCK_K)
                    masked = tl.where(kept, w, 0.0)
                # Select, never multiply by 0: what another mask keeps may be Inf.
                sums = tl.where(mine[:, None], tl.dot(tile, masked.T, sums, input_precision=PRECISION), sums)
    if HAS_BIAS:
        n = column + tl.arange(0, BLOCK_N)
        sums += tl.load(bias + n, mask=n < N, other=0).to(tl.float32)[None, :]
    there = (task >= -1) & (task < COUNT)
    sums = tl.where(there[:, None], sums, float("nan"))
    store_tile(y, sums, row, column, M, N, stride_ym, stride_yn, BLOCK_M, BLOCK_N)
