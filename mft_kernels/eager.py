"""A masked layer in PyTorch's own ops, without autograd: what every kernel of ours has to beat.

The masked weight is made in memory, and torch's GEMM does the rest. The reference is written to be right everywhere;
this is what a careful user would write to be fast.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def eager_linear(x: Tensor, weight: Tensor, scores: Tensor, threshold: Tensor) -> Tensor:
    """Compute y = x @ where(|scores| >= threshold, weight, 0).T."""
    return F.linear(x, torch.where(scores.abs() >= threshold, weight, 0))


def eager_grad_x(grad_output: Tensor, weight: Tensor, scores: Tensor, threshold: Tensor) -> Tensor:
    """Compute d_x = grad_output @ where(|scores| >= threshold, weight, 0)."""
    return grad_output @ torch.where(scores.abs() >= threshold, weight, 0)


def eager_grad_scores(grad_output: Tensor, x: Tensor, weight: Tensor, scores: Tensor) -> Tensor:
    """Compute d_scores = (grad_output.T @ x) * weight * sign(scores)."""
    return (grad_output.T @ x).mul_(weight).mul_(scores.sign())


def eager_step(
    grad_output: Tensor, x: Tensor, weight: Tensor, scores: Tensor, threshold: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (y, d_x, d_scores). The masked weight is made once."""
    masked = torch.where(scores.abs() >= threshold, weight, 0)
    return F.linear(x, masked), grad_output @ masked, eager_grad_scores(grad_output, x, weight, scores)
