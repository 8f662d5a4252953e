"""Many masks on one weight, one per row: y[i] = x[i] @ where(masks[tasks[i]], weight, 0).T + bias; task -1 keeps all.

    x (M, K), weight (N, K), up to 16 masks (N, ceil(K / 32)), one task for every EACH rows

One program makes a BLOCK_M x BLOCK_N tile of y, or of a part of its sum (product.py). It reads a tile of the weight
once, and masks and multiplies it once for each mask that one of its rows takes. From each product it keeps only the
rows that take that mask. This is meant for few tokens, whose products should take less time than loading the weight.
No tile size was measured on a GPU.
"""

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...operands import Keep, KeepByTask
from .arguments import arithmetic, operands
from .launch import launch
from .plan import Problem, many_tiles
from .product import Split, fused_product, store_product
from .target import target_of
from .tiles import load_tile, load_words, spread


def product_by_task(a: Tensor, weight: Tensor, keep: KeepByTask, bias: Tensor | None, transposed: bool) -> Tensor:
    """Compute the product with a mask per row, the forward in one pass over the weight. An unknown task gives NaN."""
    masks, tasks = keep.masks, keep.tasks
    if transposed:
        return _d_x(a, weight, masks, tasks)
    (n, k), axes = weight.shape, a.shape[:-1]
    rows = axes.numel()
    y = a.new_empty((rows, n))
    a = a.reshape(rows, k)
    least = max(1, rows), max(1, n), max(1, k)
    tiles = many_tiles(Problem(target_of(a.device), *least, operands(weight, None, True)), len(masks))
    split = Split.of(tiles, y, k)
    every = [packed.contiguous() for packed in masks]
    # One binary for 3 and 4 masks, one for 5 to 8, and so on: serving does not compile for each new task.
    unused = (1 << (len(every) - 1).bit_length()) - len(every) if every else 0
    bias = bias if bias is None else bias.contiguous()
    launch(
        _many_masks_kernel,
        (math.ceil(rows / tiles.rows) * math.ceil(n / tiles.columns) * split.splits,),
        a,
        weight,
        tuple(every + every[:1] * unused),
        tasks.contiguous(),
        bias,
        y,
        split.parts,
        rows,
        n,
        k,
        max(1, rows // max(1, len(tasks))),
        len(masks),
        split.splits,
        split.part,
        *a.stride(),
        *weight.stride(),
        *y.stride(),
        COUNT=len(masks) + unused,
        **tiles.options("MNK"),
        **arithmetic(weight),
    )
    split.add_up(bias, y)
    return y.view(*axes, n)


def _d_x(grad_output: Tensor, weight: Tensor, masks: Sequence[Tensor], tasks: Tensor) -> Tensor:
    """Compute d_x: for each mask the product of all rows, of which only the rows that take the mask are used."""
    (n, k), rows = weight.shape, grad_output.shape[:-1].numel()
    grad, task = grad_output.reshape(rows, n), tasks.repeat_interleave(max(1, rows // max(1, len(tasks)))).unsqueeze(1)
    d_x = grad.new_full((rows, k), torch.nan)
    if 0 not in (rows, n, k):
        every = [weight.new_full((n, -(-k // 32)), -1, dtype=torch.int32), *masks]
        for place, packed in enumerate(every, start=-1):
            product = fused_product(grad, weight, Keep(packed.contiguous()), None, True)
            d_x = torch.where(task == place, product, d_x)
    elif n == 0:
        d_x.zero_()
    return d_x.view(*grad_output.shape[:-1], k)


@triton.jit(do_not_specialize=["M", "EACH", "MASKS", "SPLITS"])
def _many_masks_kernel(
    x, weight, masks, tasks, bias, y, parts, M, N, K, EACH, MASKS, SPLITS, K_SPLIT,
    stride_xm, stride_xk, stride_wn, stride_wk, stride_ym, stride_yn,
    COUNT: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Compute one tile per program: of y if SPLITS is 1, otherwise of one of the parts. MASKS <= COUNT.

    See _masked_product_kernel.
    """
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles = tiles_m * tl.cdiv(N, BLOCK_N)
    split = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    row = tile % tiles_m * BLOCK_M
    column = tile // tiles_m * BLOCK_N
    start = split * K_SPLIT
    m = row + tl.arange(0, BLOCK_M)
    task = tl.load(tasks + m // EACH, mask=m < M, other=-2)
    task = tl.where((task >= -1) & (task < MASKS), task, -2).to(tl.int32)  # checked before the cast: 2^32 is not task 0
    words = tl.cdiv(K, 32)
    taken = 0  # one bit per mask, set if a row takes it; the last bit is the whole weight
    for i in tl.static_range(COUNT + 1):
        taken |= tl.max((task == (i if i < COUNT else -1)).to(tl.int32), 0) << i
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in tl.range(start, min(start + K_SPLIT, K), BLOCK_K, num_stages=STAGES):
        a = load_tile(x, row, k, M, K, stride_xm, stride_xk, BLOCK_M, BLOCK_K, False)
        w = load_tile(weight, column, k, N, K, stride_wn, stride_wk, BLOCK_N, BLOCK_K, False)
        if UPCAST:  # see product_tile
            a = a.to(tl.float32)
            w = w.to(tl.float32)
        for i in tl.static_range(COUNT + 1):
            takes = (taken >> i) & 1
            if i < COUNT:  # outside the branch: inside it, a load starts only when it is waited for
                word = load_words(masks[i], column, k, N * takes, K, words, BLOCK_N, BLOCK_K)
            if takes != 0:
                masked = w
                if i < COUNT:
                    masked = tl.where(spread(word, BLOCK_N, BLOCK_K), w, 0.0)
                # Select, never multiply by 0: what another mask keeps may be Inf.
                mine = task == (i if i < COUNT else -1)
                sums = tl.where(mine[:, None], tl.dot(a, masked.T, sums, input_precision=PRECISION), sums)
    sums = tl.where((task >= -1)[:, None], sums, float("nan"))
    store_product(y, parts, split, SPLITS, sums, bias, row, column, M, N, stride_ym, stride_yn, BLOCK_M, BLOCK_N)
