"""Weights by their names in the model: put them on a clone, and save them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mft.files.atomic import atomic_file

if TYPE_CHECKING:
    from torch import Tensor, nn

Weights = dict[str, "Tensor"]


def clone_with_weights(model: nn.Module, weights: Weights) -> nn.Module:
    """Return a clone of model that owns these parameters; it shares the others."""
    import torch

    from mft.models.causal_lm import clone_with_own_weights

    clone = clone_with_own_weights(model, {name.rpartition(".")[0] for name in weights})
    with torch.no_grad():
        for name, weight in weights.items():
            clone.get_parameter(name).copy_(weight)
    return clone


def load_weights(path: Path) -> Weights:
    from safetensors.torch import load_file

    return load_file(path)


def save_weights(weights: Weights, path: Path) -> None:
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as scratch:
        save_file({name: weight.contiguous() for name, weight in weights.items()}, scratch)
