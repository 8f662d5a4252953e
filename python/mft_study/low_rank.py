"""A low-rank change of a linear layer's weight, merged where the weight is not 0."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

SCALE = 2.0  # of LoRA: alpha / rank


class _LowRank(nn.Module):
    """weight -> weight + SCALE * up @ down, where the weight is not 0. Begins without a change, as LoRA does."""

    def __init__(self, weight: Tensor, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        rows, columns = weight.shape
        bound = 1 / math.sqrt(columns)
        down = torch.empty(rank, columns).uniform_(-bound, bound, generator=generator)
        self.down = nn.Parameter(down.to(weight.device))
        self.up = nn.Parameter(torch.zeros(rows, rank, device=weight.device))

    def forward(self, weight: Tensor) -> Tensor:
        changed = weight + SCALE * (self.up @ self.down)
        return changed.to(weight.dtype).where(weight != 0, 0)


def add_low_rank(modules: Iterable[Any], rank: int, seed: int) -> None:
    """Give each module's weight a change of this rank, which is all that requires grad of it."""
    generator = torch.Generator().manual_seed(seed)
    for module in modules:
        register_parametrization(module, "weight", _LowRank(module.weight.detach(), rank, generator))
