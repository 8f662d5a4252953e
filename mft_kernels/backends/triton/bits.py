"""pack_mask and pack_signs: one bit per score, 32 columns per word, from one read of the scores.

scores (N, K), any strides  ->  words int32 (N, ceil(K / 32)) contiguous; bit j % 32 of word j // 32 is column j
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch
from .tiles import is_kept, load_thresholds, load_tile

# 16 x 256 scores per program, 32 per thread. The words of a row then fill a sector of 32 bytes, and a row of scores
# fills lines of 128 bytes. If the scores are transposed, a column of 16 still fills a sector.
_BLOCK_N = 16
_BLOCK_K = 256


def pack_mask(scores: Tensor, threshold: Tensor, mode: str) -> Tensor:
    """Return the mask as bits, int32 (N, ceil(K / 32)). threshold: () or (N,), one per row."""
    return _pack(scores, threshold, mode, None)


def pack_signs(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Return (scores > 0 as bits, the number of scores that are exactly 0)."""
    zeros = torch.zeros((), dtype=torch.int64, device=scores.device)
    return _pack(scores, None, "signs", zeros), zeros


def _pack(scores: Tensor, thresholds: Tensor | None, mode: str, zeros: Tensor | None) -> Tensor:
    n, k = scores.shape
    words = torch.empty((n, triton.cdiv(k, 32)), dtype=torch.int32, device=scores.device)
    stride_t = thresholds.stride(0) if thresholds is not None and thresholds.dim() == 1 else 0
    launch(
        _pack_kernel,
        (triton.cdiv(n, _BLOCK_N) * triton.cdiv(k, _BLOCK_K),),
        scores,
        thresholds,
        words,
        zeros,
        n,
        k,
        *scores.stride(),
        stride_t,
        MODE=mode,
        BLOCK_N=_BLOCK_N,
        BLOCK_K=_BLOCK_K,
        num_warps=4,
        maxnreg=96,
    )
    return words


@triton.jit
def _pack_kernel(
    scores, thresholds, words, zeros, N, K, stride_n, stride_k, stride_t,
    MODE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Pack one tile of BLOCK_N rows and BLOCK_K columns per program. MODE: the mode of the mask, or "signs"."""
    tiles_k = tl.cdiv(K, BLOCK_K)
    row = tl.program_id(0) // tiles_k * BLOCK_N
    column = tl.program_id(0) % tiles_k * BLOCK_K
    tile = load_tile(scores, row, column, N, K, stride_n, stride_k, BLOCK_N, BLOCK_K, False)
    r = row + tl.arange(0, BLOCK_N)
    c = column + tl.arange(0, BLOCK_K)
    inside = (r < N)[:, None] & (c < K)[None, :]
    if MODE == "signs":
        values = tile.to(tl.float32)
        bits = values > 0
        found = tl.sum(tl.sum(((values == 0) & inside).to(tl.int32), 1), 0).to(tl.int64)
        tl.atomic_add(zeros, found, mask=found > 0, sem="relaxed")
    else:
        bits = is_kept(tile, load_thresholds(thresholds, row, N, stride_t, BLOCK_N), MODE) & inside
    # The bits are distinct, so their sum is their union; bit 31 wraps into the sign.
    shifted = bits.to(tl.int32).reshape(BLOCK_N, BLOCK_K // 32, 32) << tl.arange(0, 32)[None, None, :]
    w = column // 32 + tl.arange(0, BLOCK_K // 32)
    words_k = tl.cdiv(K, 32)
    pointers = words + r.to(tl.int64)[:, None] * words_k + w[None, :]
    tl.store(pointers, tl.sum(shifted, 2), mask=(r < N)[:, None] & (w < words_k)[None, :])
