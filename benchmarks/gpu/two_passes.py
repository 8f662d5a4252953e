"""The two passes of the strongest implementation without fusion, between torch's own products.

forward    masked = where(keep, weight, 0)      one Triton pass     y = x @ masked.T      cuBLAS
d_x                                                                 d_x = grad @ masked   cuBLAS
d_scores   d = grad.T @ x      cuBLAS           one Triton pass     d = d * weight * sign(scores), in place
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

#: 16 elements per thread: two loads of 16 bytes from each matrix.
_BLOCK = 2048
_OPTIONS = {"BLOCK": _BLOCK, "num_warps": 4}


@triton.jit
def _mask_kernel(weight, scores, threshold, out, numel, BLOCK: tl.constexpr):
    """out = where(|scores| >= threshold, weight, 0), contiguous, BLOCK elements per program."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < numel
    w = tl.load(weight + offsets, mask=inside).to(tl.float32)
    s = tl.load(scores + offsets, mask=inside).to(tl.float32)
    w = tl.where(tl.abs(s) >= tl.load(threshold).to(tl.float32), w, 0.0)
    tl.store(out + offsets, w.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _apply_sign_kernel(products, weight, scores, numel, BLOCK: tl.constexpr):
    """products *= weight * sign(scores), contiguous, BLOCK elements per program."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < numel
    d = tl.load(products + offsets, mask=inside).to(tl.float32)
    w = tl.load(weight + offsets, mask=inside).to(tl.float32)
    s = tl.load(scores + offsets, mask=inside).to(tl.float32)
    d = d * w
    d = tl.where(s > 0, d, tl.where(s < 0, -d, 0.0))
    tl.store(products + offsets, d.to(products.dtype.element_ty), mask=inside)


def mask(weight: Tensor, scores: Tensor, threshold: Tensor) -> Tensor:
    """where(|scores| >= threshold, weight, 0); all contiguous."""
    out = torch.empty_like(weight)
    grid = (triton.cdiv(weight.numel(), _BLOCK),)
    _mask_kernel[grid](weight, scores, threshold, out, weight.numel(), **_OPTIONS)
    return out


def grad_scores(grad_output: Tensor, x: Tensor, weight: Tensor, scores: Tensor) -> Tensor:
    """(grad_output.T @ x) * weight * sign(scores); weight and scores contiguous."""
    products = grad_output.T @ x
    grid = (triton.cdiv(products.numel(), _BLOCK),)
    _apply_sign_kernel[grid](products, weight, scores, products.numel(), **_OPTIONS)
    return products
