"""Gradient checkpointing over a frozen prefix: the layers below the first masked one keep running without autograd.

If checkpointing is on, transformers makes the embeddings' output require a gradient, because a reentrant checkpoint
passes no gradient if none of its inputs requires one. Every frozen layer would then be recomputed and differentiated
for nothing. Here only the first masked layer's input requires a gradient, and only if its checkpoint is reentrant.
"""

from typing import Any

import torch
from torch import Tensor, nn

from mft.models.head_input import remove_pre_hooks


class PrefixWithoutCheckpoints:
    """Forward pre-hook of the module that contains layers. model's first masked layer is layers[first]."""

    def __init__(self, model: nn.Module, layers: nn.ModuleList, first: int) -> None:
        self.model = model
        self.layers = layers
        self.first = first

    def __call__(self, module: nn.Module, args: tuple) -> None:
        model: Any = self.model
        hooked = bool(getattr(model, "_require_grads_hooks", None))
        below: list[Any] = list(self.layers[: self.first])
        checkpointed = [layer for layer in below if getattr(layer, "gradient_checkpointing", False)]
        if not (hooked or checkpointed) or self._trains_elsewhere():
            return
        if hooked:
            model.disable_input_require_grads()
        for layer in checkpointed:  # the backward pass needs nothing from them
            layer.gradient_checkpointing = False

    def _trains_elsewhere(self) -> bool:
        above = {id(p) for layer in self.layers[self.first :] for p in layer.parameters()}
        return any(p.requires_grad and id(p) not in above for p in self.model.parameters())


class ReentrantEntry:
    """Forward pre-hook of the first masked layer: makes its input require a gradient for a reentrant checkpoint."""

    def __call__(self, layer: nn.Module, args: tuple) -> None:
        checkpoint = getattr(layer, "_gradient_checkpointing_func", None)
        active = getattr(layer, "gradient_checkpointing", False) and layer.training and torch.is_grad_enabled()
        if not active or not getattr(checkpoint, "keywords", {}).get("use_reentrant", False):
            return
        if args and isinstance(args[0], Tensor) and args[0].is_floating_point() and not args[0].requires_grad:
            args[0].requires_grad_(True)


def add_checkpointing_hooks(model: nn.Module, stack: str, first: int) -> None:
    """Make checkpointing skip the layers below the first masked one. stack: name of the list of decoder layers."""
    layers: Any = model.get_submodule(stack)
    around = model.get_submodule(stack.rpartition(".")[0])
    around.register_forward_pre_hook(PrefixWithoutCheckpoints(model, layers, first))
    layers[first].register_forward_pre_hook(ReentrantEntry())


def remove_checkpointing_hooks(model: nn.Module) -> None:
    """Undo add_checkpointing_hooks."""
    remove_pre_hooks(model, PrefixWithoutCheckpoints, ReentrantEntry)
