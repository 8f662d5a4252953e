"""The places in other modules that a masked layer must not stand in, or that it changes when it is put there.

A masked layer does not multiply by its ``weight`` alone, so a parent that reads ``child.weight`` instead of calling the
child would leave the mask out without a word. Of torch's modules these do (torch 2.11 to 2.13):

    nn.MultiheadAttention        out_proj          always                         refused
    nn.LinearCrossEntropyLoss    linear            always                         refused
    nn.TransformerEncoderLayer   linear1, linear2  in its inference fast path     kept on its slow path

The rule holds wherever a module is registered (``layer.linear1 = masked``, add_module, set_submodule): torch calls a
hook there. Writing into ``_modules`` goes past it.
"""

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

_READERS = {"MultiheadAttention": ("out_proj",), "LinearCrossEntropyLoss": ("linear",)}  # the second since torch 2.13


def why_not_there(parent: nn.Module, name: str) -> str | None:
    """Why parent's child of this name cannot be a masked layer; None if it can."""
    for reader, children in _READERS.items():
        if name in children and isinstance(parent, getattr(nn, reader, ())):
            return f"nn.{reader} computes with {name}.weight itself and would leave the mask out"
    return None


def _on_registration(parent: nn.Module, name: str, child: nn.Module | None) -> None:
    """Called by torch before child becomes parent.name. Classes say of themselves that they mask their weight."""
    if not getattr(type(child), "masks_weight", False):
        return
    why = why_not_there(parent, name)
    if why is not None:
        raise ValueError(
            f"{name} of {type(parent).__name__} must not be a {type(child).__name__}: {why}. Leave it as it is, or "
            "write a module that calls it"
        )
    if isinstance(parent, nn.TransformerEncoderLayer) and name in ("linear1", "linear2"):
        # One of the conditions of the fast path; an attribute, so that copies and pickles keep it. It stays off after
        # a merge: right, if slower.
        parent.activation_relu_or_gelu = 0


register_module_module_registration_hook(_on_registration)
