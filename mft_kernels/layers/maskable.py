"""What can be masked: which linear layers, and as which children of other modules.

A masked layer does not multiply by its ``weight`` alone, so a parent that reads ``child.weight`` instead of calling the
child would silently leave the mask out. These modules of torch do so (torch 2.11 to 2.13):

    nn.MultiheadAttention        out_proj          always                         refused: see attention.py
    nn.LinearCrossEntropyLoss    linear            always                         refused
    nn.TransformerEncoderLayer   linear1, linear2, in its inference fast path     kept on its slow path
                                 self_attn

A hook of torch applies this rule whenever a module is registered (``layer.linear1 = masked``, add_module,
set_submodule). Writing into ``_modules`` bypasses it.
"""

from typing import Any

from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.nn.modules.module import register_module_module_registration_hook

# Classes whose own forward is x @ weight.T + bias and no more. Other classes declare it by computes_linear = True.
_LINEARS = {"transformers.models.falcon.modeling_falcon.FalconLinear"}
_READERS = {"MultiheadAttention": ("out_proj",), "LinearCrossEntropyLoss": ("linear",)}  # the second since torch 2.13
_INSTEAD = {
    "MultiheadAttention": "MaskedMultiheadAttention.from_attention(attention) makes one that calls it",
    "LinearCrossEntropyLoss": "Leave it as it is, or write a module that calls it",
}


def why_no_mask(module: nn.Module, kind: type[nn.Module] = nn.Linear) -> str | None:
    """Return why a masked layer of this kind cannot replace module; None if it can.

    A masked layer computes what ``kind`` computes, from a weight of ordinary floating-point numbers, and nothing else.
    So module must have the forward of ``kind``, or a class that is known to compute the same.
    """
    other = other_than(kind, module)
    weight = module._parameters.get("weight")
    if other is not None and not _computes_linear(type(module)):
        return f"it is {other}{_explain_lost_forward(type(module), kind, weight)}"
    if weight is None:
        return (
            "its weight is not a parameter, but computed from others (by a parametrisation or pruning): make that "
            "permanent first"
        )
    if getattr(module, "bias", weight) is not module._parameters.get("bias"):
        return (
            "its bias must be a parameter or None, got one that is computed from others (by a parametrisation or "
            "pruning) or stored in another way: make that permanent first"
        )
    return why_no_scores(weight) or why_lost(module)


def other_than(kind: type[nn.Module], module: nn.Module) -> str | None:
    """Return what module is instead of a plain ``kind``; None if it has the forward of one."""
    code: Any = type(module)
    if code.forward is kind.forward and code.__call__ is kind.__call__:
        return None
    return f"a {_full_name(code)}, not a plain {_short_name(kind)}"


def why_lost(module: nn.Module) -> str | None:
    """Return what was done to this one module's forward, which a replacement would lose; None if nothing."""
    if hasattr(module, "_hf_hook") or "forward" in vars(module):
        return (
            "its forward is replaced (by a device_map of several devices or offloading, or patched): load it on one "
            "device, mask it, and dispatch it afterwards"
        )
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return "it has hooks, which a masked layer would lose: mask it first, and add them afterwards"
    return None


def why_no_scores(weight: Tensor) -> str | None:
    """Return why a parameter like this cannot have a mask; None if it can."""
    if type(weight.data) not in (Tensor, FakeTensor) or not weight.is_floating_point() or weight.element_size() < 2:
        return f"it holds a {type(weight.data).__name__} of {weight.dtype}: masks need fp32, fp16 or bf16 weights"
    return None


def why_not_there(parent: nn.Module, name: str) -> str | None:
    """Return why parent's child of this name cannot be a masked layer; None if it can."""
    reader = _reader(parent, name)
    return None if reader is None else f"nn.{reader} computes with {name}.weight itself and would leave the mask out"


def has_slow_path(parent: nn.Module, name: str) -> bool:
    """Return whether parent reads this child's weights only on its fast path, which a masked layer turns off."""
    return isinstance(parent, nn.TransformerEncoderLayer) and name in ("linear1", "linear2", "self_attn")


def _computes_linear(code: type) -> bool:
    """Return whether code is in _LINEARS or has ``computes_linear = True``.

    A subclass with its own forward does not inherit either.
    """
    decisive = {"computes_linear", "forward", "__call__"}
    nearest = next(each for each in code.__mro__ if decisive & vars(each).keys())  # nn.Module at the latest
    return bool(vars(nearest).get("computes_linear", _full_name(nearest) in _LINEARS))


def _explain_lost_forward(code: type, kind: type, weight: Tensor | None) -> str:
    """Return what a masked layer would leave out if it replaced a layer of this class and weight, and what to do."""
    why = None if weight is None else why_no_scores(weight)
    if why is not None:
        return f", and {why.removeprefix('it ')}"
    lost = ": it has its own forward (quantised, adapted, or with extra steps), which a masked layer would leave out"
    if weight is None or weight.dim() != 2:
        return lost
    return (
        f"{lost}. If it computes what {_short_name(kind)} does and no more, set {code.__name__}.computes_linear = True"
    )


def _full_name(code: type) -> str:
    return f"{code.__module__}.{code.__qualname__}"


def _short_name(kind: type) -> str:
    return f"{'nn.' * kind.__module__.startswith('torch.nn.')}{kind.__name__}"


def _reader(parent: nn.Module, name: str) -> str | None:
    for reader, children in _READERS.items():
        if name in children and isinstance(parent, getattr(nn, reader, ())):
            return reader
    return None


def _on_registration(parent: Any, name: str, child: nn.Module | None) -> None:
    """Refuse a masked child whose weight parent reads itself; if only a fast path reads it, turn that off.

    torch calls this before child becomes parent.name. Classes that mask their weight declare it
    by ``masks_weight = True``.
    """
    if not getattr(type(child), "masks_weight", False):
        return
    reader = _reader(parent, name)
    if reader is not None:
        raise ValueError(
            f"{name} of {type(parent).__name__} must not be a {type(child).__name__}: {why_not_there(parent, name)}. "
            f"{_INSTEAD[reader]}"
        )
    if has_slow_path(parent, name):
        # A value of 0 turns the fast path off. An attribute is kept by copies and pickles. The fast path stays off
        # after a merge: the result is right, but slower.
        parent.activation_relu_or_gelu = 0


register_module_module_registration_hook(_on_registration)
