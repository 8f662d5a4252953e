"""What can be masked: which linear layers, and in which places of the modules around them.

A masked layer does not multiply by its ``weight`` alone, so a parent that reads ``child.weight`` instead of calling the
child would leave the mask out without a word. Of torch's modules these do (torch 2.11 to 2.13):

    nn.MultiheadAttention        out_proj          always                         refused: see attention.py
    nn.LinearCrossEntropyLoss    linear            always                         refused
    nn.TransformerEncoderLayer   linear1, linear2, in its inference fast path     kept on its slow path
                                 self_attn

The rule holds wherever a module is registered (``layer.linear1 = masked``, add_module, set_submodule): torch calls a
hook there. Writing into ``_modules`` goes past it.
"""

from typing import Any

from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.nn.modules.module import register_module_module_registration_hook

from .linear_probe import why_not_linear

_READERS = {"MultiheadAttention": ("out_proj",), "LinearCrossEntropyLoss": ("linear",)}  # the second since torch 2.13
_INSTEAD = {
    "MultiheadAttention": "MaskedMultiheadAttention.from_attention(attention) makes one that calls it",
    "LinearCrossEntropyLoss": "Leave it as it is, or write a module that calls it",
}


def why_no_mask(module: nn.Module, kind: type[nn.Module] = nn.Linear) -> str | None:
    """Why module, of this kind or in its place, cannot be masked; None if it can.

    A masked layer computes what ``kind`` computes, from a weight of ordinary floating-point numbers, and nothing else.
    Whether a forward of its own does, where the kind is nn.Linear, is found by trying it.
    """
    code: Any = type(module)
    is_plain = code.forward is kind.forward and code.__call__ is kind.__call__
    named = f"it is a {code.__module__}.{code.__qualname__}, not a plain {'nn.' * (kind is nn.Linear)}{kind.__name__}"
    weight = module._parameters.get("weight")
    if not is_plain and (kind is not nn.Linear or weight is None or weight.dim() != 2):
        return (
            f"{named}: its forward is its own (quantised, adapted, or with more to it), and a masked layer would leave "
            "that out"
        )
    if weight is None:
        return "its weight is no parameter, but made of others (by a parametrisation or pruning): bake that in first"
    why = why_no_scores(weight)
    if why is not None:
        return why if is_plain else f"{named}, and {why.removeprefix('it ')}"
    why = why_lost(module)
    if why is None and not is_plain:
        more = why_not_linear(module)
        why = None if more is None else f"{named}: {more}. A masked layer would leave that out"
    return why


def why_lost(module: nn.Module) -> str | None:
    """What was done to this one module's forward, which nothing in its place would do; None if nothing."""
    if hasattr(module, "_hf_hook") or "forward" in vars(module):
        return (
            "its forward is replaced (by a device_map of several devices or offloading, or patched): load it on one "
            "device, mask it, and dispatch it afterwards"
        )
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return "it has hooks, which a masked layer would lose: mask it first, and add them afterwards"
    return None


def why_no_scores(weight: Tensor) -> str | None:
    """Why no mask can lie on a parameter like this; None if one can."""
    if type(weight.data) not in (Tensor, FakeTensor) or not weight.is_floating_point() or weight.element_size() < 2:
        return f"it holds a {type(weight.data).__name__} of {weight.dtype}: masks need fp32, fp16 or bf16 weights"
    return None


def why_not_there(parent: nn.Module, name: str) -> str | None:
    """Why parent's child of this name cannot be a masked layer; None if it can."""
    reader = _reader(parent, name)
    return None if reader is None else f"nn.{reader} computes with {name}.weight itself and would leave the mask out"


def has_slow_path(parent: nn.Module, name: str) -> bool:
    """Whether parent reads this child's weights on its fast path alone, off which a masked layer keeps it."""
    return isinstance(parent, nn.TransformerEncoderLayer) and name in ("linear1", "linear2", "self_attn")


def _reader(parent: nn.Module, name: str) -> str | None:
    for reader, children in _READERS.items():
        if name in children and isinstance(parent, getattr(nn, reader, ())):
            return reader
    return None


def _on_registration(parent: Any, name: str, child: nn.Module | None) -> None:
    """Called by torch before child becomes parent.name. Classes say of themselves that they mask their weight."""
    if not getattr(type(child), "masks_weight", False):
        return
    reader = _reader(parent, name)
    if reader is not None:
        raise ValueError(
            f"{name} of {type(parent).__name__} must not be a {type(child).__name__}: {why_not_there(parent, name)}. "
            f"{_INSTEAD[reader]}"
        )
    if has_slow_path(parent, name):
        # One of the conditions of the fast path; an attribute, so that copies and pickles keep it. It stays off after
        # a merge: right, if slower.
        parent.activation_relu_or_gelu = 0


register_module_module_registration_hook(_on_registration)
