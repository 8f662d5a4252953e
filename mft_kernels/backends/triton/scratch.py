"""The other way to a product: one pass writes where(keep, weight, 0) into scratch memory, then torch's GEMM multiplies.

The pass moves 3 elements per weight, and the GEMM needs M multiply-adds per weight. So from some M on (see choice.py),
a faster GEMM repays the pass. The scratch has the size of the weight and is freed at once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...operands import Keep
from ...reference.linear import filled
from .launch import launch
from .tiles import load_tile, store_kept

#: 64 x 64: two loads of 16 bytes per thread from each 16-bit matrix, and enough tiles for every multiprocessor.
_BLOCK = 64


@triton.jit
def _masked_weight_kernel(
    weight, keep, thresholds, out, N, K, stride_wn, stride_wk, stride_kn, stride_kk, stride_t,
    MODE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Write contiguous out (N, K) = where(keep, weight, 0). Grid (tiles of K, tiles of N); a program owns one tile."""
    row = tl.program_id(1) * BLOCK_N
    column = tl.program_id(0) * BLOCK_K
    w = load_tile(weight, row, column, N, K, stride_wn, stride_wk, BLOCK_N, BLOCK_K, False)
    store_kept(
        out, w, keep, thresholds, row, column, N, K, stride_kn, stride_kk, stride_t, MODE, BLOCK_N, BLOCK_K
    )  # fmt: skip


def product_through_scratch(a: Tensor, weight: Tensor, keep: Keep, bias: Tensor | None, transposed: bool) -> Tensor:
    """Compute a (M, Q) -> (M, P): a @ Wm.T + bias, or a @ Wm if transposed."""
    a, masked = filled(a, 1), filled(masked_weight(weight, keep), 0 if transposed else 1)
    return a @ masked if transposed else torch.nn.functional.linear(a, masked, bias)


def masked_weight(weight: Tensor, keep: Keep) -> Tensor:
    """Return where(keep, weight, 0), (N, K)."""
    n, k = weight.shape
    out = weight.new_empty((n, k))
    launch(
        _masked_weight_kernel,
        (triton.cdiv(k, _BLOCK), triton.cdiv(n, _BLOCK)),
        weight,
        keep.source,
        keep.thresholds,
        out,
        n,
        k,
        *weight.stride(),
        *keep.source.stride(),
        keep.threshold_stride,
        MODE=keep.mode,
        BLOCK_N=_BLOCK,
        BLOCK_K=_BLOCK,
        num_warps=8,
        maxnreg=128,  # at least two blocks per multiprocessor, because the pass only waits for memory
    )
    return out
