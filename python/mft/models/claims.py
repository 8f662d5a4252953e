"""Check a model's config against the files of its weights before the model is built.

A config of a few hundred bytes may claim 30,000 layers, or a hidden size of a million. Only claims that no files could
hold are refused. Composite, tied, sharded and quantised models all store at least one tensor per layer and one bit per
parameter.
"""

import re
from pathlib import Path
from typing import Any

from torch import nn

_LAYERS = re.compile(r"((\w+_)?(num|n)_(\w+_)?|(\w*_)?(encoder|decoder)_)?layers?|depth")  # keys that count modules
_ANY_LAYERS = 256  # allowed for any files, because layers may share their weights
_MOST_LAYERS = 10_000  # if the weights' files are not here; no model has a tenth as many
_ANY_PARAMETERS = 2**26  # allowed for any files: 256 MiB of float32
_MOST_PARAMETERS = 8  # per byte: one bit each, less than any code of weights takes


def check_layers(path: Path, config: dict[str, Any], tensors: int) -> None:
    """Raise ValueError if config, read from path, claims more layers than its weights have tensors (0: unknown)."""
    most = max(tensors, _ANY_LAYERS) if tensors else _MOST_LAYERS
    parts = [config]
    while parts:
        part = parts.pop()
        for key, value in part.items():
            if isinstance(value, dict):
                parts.append(value)
            elif isinstance(value, int | float) and value > most and _LAYERS.fullmatch(key):
                held = f"{tensors} tensors in its weights" if tensors else "any model"
                raise ValueError(
                    f"{path}: {key} must be at most {most}, got {value} for {held}: copy config and weights again"
                )


def check_parameters(outline: nn.Module, stored: int, name: str) -> None:
    """Raise ValueError if outline, the model on the meta device, has more parameters than ``stored`` bytes hold."""
    claimed = sum(tensor.numel() for tensor in (*outline.parameters(), *outline.buffers()))
    if claimed > max(_ANY_PARAMETERS, _MOST_PARAMETERS * stored):
        raise ValueError(
            f"model.name {name!r} must have weights for all that its config claims, got {claimed} parameters for "
            f"{stored} bytes of weights: copy config and weights again"
        )
