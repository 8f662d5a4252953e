"""Make the head's input contiguous, so that a frozen head reads a batch's last positions in one product.

generate passes only the last position of each row to the head, and these are not adjacent in memory. torch up to 2.13
makes one product of them only if the head's weight requires a gradient. For a frozen weight it copies the weight once
per row (pytorch issue 186148). 32 prompts of SmolLM2 in bf16 on one Zen 4 core: 1.8 GB and 3.6 s instead of 0.02 s.
"""

from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

# TODO: drop this file when the oldest supported torch folds such rows by itself.


class InOnePiece:
    """Forward pre-hook of a head that makes its inputs contiguous."""

    def __call__(self, head: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(each.contiguous() if isinstance(each, Tensor) else each for each in args)


def read_in_one_piece(model: nn.Module) -> RemovableHandle | None:
    """Add the hook to the model's head, if it has a head without the hook."""
    head: Any = getattr(model, "get_output_embeddings", lambda: None)()
    if head is None or any(isinstance(hook, InOnePiece) for hook in head._forward_pre_hooks.values()):
        return None
    return head.register_forward_pre_hook(InOnePiece())


def forget_in_one_piece(model: nn.Module) -> None:
    """Undo read_in_one_piece."""
    remove_pre_hooks(model, InOnePiece)


def remove_pre_hooks(model: nn.Module, *kinds: type) -> None:
    """Remove the forward pre-hooks of these classes from all modules."""
    for module in model.modules():
        for key, hook in list(module._forward_pre_hooks.items()):
            if isinstance(hook, kinds):
                del module._forward_pre_hooks[key]
