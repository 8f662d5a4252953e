"""Weights by their names in the model: put them on a clone, and save them."""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mft.files.atomic import atomic_file
from mft.models.causal_lm import clone_with_own_weights

Weights = dict[str, Tensor]


def with_weights(model: nn.Module, weights: Weights) -> nn.Module:
    """Return a clone of model that owns these parameters; it shares the others."""
    clone = clone_with_own_weights(model, {name.rpartition(".")[0] for name in weights})
    with torch.no_grad():
        for name, weight in weights.items():
            clone.get_parameter(name).copy_(weight)
    return clone


def save_weights(weights: Weights, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as scratch:
        save_file({name: weight.contiguous() for name, weight in weights.items()}, scratch)
