"""Rivals of a masked linear layer: the dense layer, the paper's own, and careful PyTorch."""

import torch
from torch import Tensor
from torch.nn import functional as F

from mft_kernels.eager import eager_grad_scores, eager_grad_x

KEEP_RATIO = 0.9
LORA, LORA_RANK = "LoRA", 16  # peft's


class _SortedSubnet(torch.autograd.Function):
    """1 for the kept share of the scores, 0 for the rest, by sorting all of them; the gradient passes through."""

    @staticmethod
    def forward(ctx, scores, keep_ratio):
        out = scores.clone()
        _, order = scores.flatten().sort()
        dropped = int((1 - keep_ratio) * scores.numel())
        flat = out.flatten()
        flat[order[:dropped]] = 0
        flat[order[dropped:]] = 1
        return flat.view_as(scores)

    @staticmethod
    def backward(ctx, grad_output):
        return grad_output, None


def paper_linear(x: Tensor, weight: Tensor, scores: Tensor, keep_ratio: float = KEEP_RATIO) -> Tensor:
    """The paper's layer: sorts |scores| in every forward, multiplies, and leaves the rest to autograd."""
    return F.linear(x, weight * _SortedSubnet.apply(scores.abs(), keep_ratio))


class _EagerFast(torch.autograd.Function):
    """Keeps the masked weight for the backward: the least arithmetic that PyTorch's own ops allow."""

    @staticmethod
    def forward(ctx, x, weight, scores, threshold):
        masked = torch.where(scores.abs() >= threshold, weight, 0)
        ctx.save_for_backward(x, weight, scores, masked)
        return F.linear(x, masked)

    @staticmethod
    def backward(ctx, grad_output):
        x, weight, scores, masked = ctx.saved_tensors
        d_x = grad_output @ masked if ctx.needs_input_grad[0] else None
        d_scores = eager_grad_scores(grad_output, x, weight, scores) if ctx.needs_input_grad[2] else None
        return d_x, None, d_scores, None


class _EagerLean(torch.autograd.Function):
    """Masks again in the backward: nothing of the weight's size lives between the two."""

    @staticmethod
    def forward(ctx, x, weight, scores, threshold):
        ctx.save_for_backward(x, weight, scores, threshold)
        return F.linear(x, torch.where(scores.abs() >= threshold, weight, 0))

    @staticmethod
    def backward(ctx, grad_output):
        x, weight, scores, threshold = ctx.saved_tensors
        d_x = eager_grad_x(grad_output, weight, scores, threshold) if ctx.needs_input_grad[0] else None
        d_scores = eager_grad_scores(grad_output, x, weight, scores) if ctx.needs_input_grad[2] else None
        return d_x, None, d_scores, None


def eager_fast(x: Tensor, weight: Tensor, scores: Tensor, threshold: Tensor) -> Tensor:
    """Careful eager PyTorch from a given threshold, the masked weight kept for the backward."""
    return _EagerFast.apply(x, weight, scores, threshold)


def eager_lean(x: Tensor, weight: Tensor, scores: Tensor, threshold: Tensor) -> Tensor:
    """Careful eager PyTorch from a given threshold, the masked weight made twice."""
    return _EagerLean.apply(x, weight, scores, threshold)
