"""Inputs and error budgets that tests and benchmarks share."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Inputs:
    """Arguments of a masked linear layer: x (M, K), weight and scores (N, K), bias (N,), grad_output (M, N)."""

    x: Tensor
    weight: Tensor
    scores: Tensor
    bias: Tensor
    grad_output: Tensor


def random_inputs(
    m: int,
    n: int,
    k: int,
    dtype: torch.dtype = torch.float32,
    scores_dtype: torch.dtype = torch.float32,
    *,
    seed: int = 0,
) -> Inputs:
    """Return normal inputs at the scales of a language model's linear layer (weights and scores at 0.02)."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return Inputs(
        x=normal(m, k).to(dtype),
        weight=(0.02 * normal(n, k)).to(dtype),
        scores=(0.02 * normal(n, k)).to(scores_dtype),
        bias=normal(n).to(dtype),
        grad_output=normal(m, n).to(dtype),
    )


def integer_inputs(
    m: int,
    n: int,
    k: int,
    dtype: torch.dtype = torch.float32,
    scores_dtype: torch.dtype = torch.float32,
    *,
    seed: int = 0,
) -> Inputs:
    """Return inputs of small integers; scores have many ties and zeros.

    Products stay exact in any order while M, N, K <= 60: sums of +-1 products times a weight of at most 2 stay below
    256, so even bf16 (8 bits) holds them and results compare with torch.equal.
    """
    generator = torch.Generator().manual_seed(seed)

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high + 1, shape, generator=generator)

    return Inputs(
        x=integers(-1, 1, m, k).to(dtype),
        weight=integers(-2, 2, n, k).to(dtype),
        scores=integers(-3, 3, n, k).to(scores_dtype),
        bias=integers(-1, 1, n).to(dtype),
        grad_output=integers(-1, 1, m, n).to(dtype),
    )


def assert_within_budget(got: Tensor, same_dtype: Tensor, exact: Tensor, factor: float = 2.0) -> None:
    """Fail unless got's largest error against float64 is at most ``factor`` times PyTorch's own in the same dtype.

    One unit in the last place of the largest value is granted on top: a lucky PyTorch error can be zero.
    """
    ours = (got.double() - exact).abs().max().item()
    theirs = (same_dtype.double() - exact).abs().max().item()
    budget = factor * theirs + exact.abs().max().item() * torch.finfo(got.dtype).eps
    assert ours <= budget, f"error {ours:.3g} exceeds the budget {budget:.3g} (PyTorch's own error {theirs:.3g})"
