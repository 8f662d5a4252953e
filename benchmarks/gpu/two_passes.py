"""The strongest form without fusion: a pass that masks, torch's own products, a pass that applies weight and sign.

forward    masked = where(keep, weight, 0)      one Triton pass     y = x @ masked.T      cuBLAS
d_x                                                                 d_x = grad @ masked   cuBLAS
d_scores   d = grad.T @ x      cuBLAS           one Triton pass     d = d * weight * sign(scores), in place
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mft_kernels.backends.triton.arguments import Keep
from mft_kernels.backends.triton.launch import launch
from mft_kernels.backends.triton.scratch import masked_weight

#: 16 elements a thread: two loads of 16 bytes from each of the three matrices.
_BLOCK = 2048


@triton.jit
def _apply_sign_kernel(products, weight, scores, numel, BLOCK: tl.constexpr):
    """products *= weight * sign(scores), contiguous, BLOCK elements a program."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < numel
    d = tl.load(products + offsets, mask=inside).to(tl.float32)
    w = tl.load(weight + offsets, mask=inside).to(tl.float32)
    s = tl.load(scores + offsets, mask=inside).to(tl.float32)
    d = d * w
    d = tl.where(s > 0, d, tl.where(s < 0, -d, 0.0))
    tl.store(products + offsets, d.to(products.dtype.element_ty), mask=inside)


def mask(weight: Tensor, scores: Tensor, threshold: Tensor) -> Tensor:
    """where(|scores| >= threshold, weight, 0)."""
    return masked_weight(weight, Keep(scores, threshold, "magnitude"))


def grad_scores(grad_output: Tensor, x: Tensor, weight: Tensor, scores: Tensor) -> Tensor:
    """(grad_output.T @ x) * weight * sign(scores); weight and scores contiguous."""
    products = grad_output.T @ x
    numel = products.numel()
    launch(
        _apply_sign_kernel, (triton.cdiv(numel, _BLOCK),), products, weight, scores, numel, BLOCK=_BLOCK, num_warps=4
    )
    return products


def step(
    grad_output: Tensor, x: Tensor, weight: Tensor, scores: Tensor, threshold: Tensor, *, keep_masked: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, d_x, d_scores); the weight is masked once and kept, or once for each product."""
    masked = mask(weight, scores, threshold)
    y = torch.nn.functional.linear(x, masked)
    if not keep_masked:
        del masked
        masked = mask(weight, scores, threshold)
    d_x = grad_output @ masked
    del masked
    return y, d_x, grad_scores(grad_output, x, weight, scores)
