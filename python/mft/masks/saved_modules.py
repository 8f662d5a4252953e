"""modules_to_save, as in PEFT: modules that are trained whole beside the masks, saved with them, and put back.

What a fresh head needs, which would else stay frozen at random values. Unlike PEFT no copy is made: the module itself
is trained, and with it whatever its weights are tied to.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mft.checks import nearest

_NAMES = "_mft_modules_to_save"  # of the modules that are trained; an attribute of the model


def select_saved_modules(model: nn.Module, patterns: Iterable[str] | None) -> list[str]:
    """Names of the modules that patterns name, by suffix as in target_modules; of nested ones the outermost.

    Raises: ValueError if a pattern names no module, or one without floating-point parameters.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    found: set[str] = set()
    for pattern in patterns or ():
        matches = [name for name in modules if f".{name}".endswith(f".{pattern}")]
        if not matches:
            known = {name if "." in pattern else name.rpartition(".")[2] for name in modules}
            raise ValueError(
                f"modules_to_save: {pattern!r} matches no module{nearest(pattern, sorted(known))}; it takes the ends "
                f"of modules' names, here for instance {', '.join(name for name, _ in model.named_children())}"
            )
        for name in matches:
            parameters = list(modules[name].parameters())
            if not parameters or not all(p.is_floating_point() for p in parameters):
                held = ", ".join(sorted({str(p.dtype) for p in parameters})) or "none"
                raise ValueError(
                    f"modules_to_save: {pattern!r} names {name} ({type(modules[name]).__name__}), whose parameters "
                    f"must be floating-point numbers to be trained, got {held}"
                )
        found |= set(matches)
    return [name for name in modules if name in found and not is_inside(name, found - {name})]


def is_inside(name: str, modules: Iterable[str]) -> bool:
    """Whether name is one of these modules or lies in one."""
    return any(f"{name}.".startswith(f"{outer}.") for outer in modules)


def train_whole(model: nn.Module, names: Iterable[str]) -> None:
    """Let the modules of these names be trained, and remember them as the model's."""
    setattr(model, _NAMES, tuple(names))
    for module in saved_modules(model).values():
        module.requires_grad_(True)


def saved_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that are trained whole, by name."""
    return {name: model.get_submodule(name) for name in getattr(model, _NAMES, ())}


def forget_saved_modules(model: nn.Module) -> None:
    """They are ordinary modules again, with what they learned."""
    vars(model).pop(_NAMES, None)


def saved_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Copies, on the CPU, of all that a state_dict has of the modules that are trained whole."""
    state = _state(saved_modules(model))
    return {key: tensor.detach().to("cpu", copy=True).contiguous() for key, tensor in state}


def check_saved_tensors(model: nn.Module, names: Iterable[str], tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless model has modules of these names that hold just these tensors."""
    missing = [name for name in names if not isinstance(_find(model, name), nn.Module)]
    if missing:
        raise ValueError(
            f"model must have the modules that were saved with the masks, {type(model).__name__} has no {missing[0]}: "
            "load the base as the class that the masks were learned on"
        )
    others = saved_modules(model).keys() - set(names)
    if others:
        raise ValueError(
            f"model must train no other modules_to_save than the export holds, got {', '.join(sorted(others))}: load "
            "the masks on the base"
        )
    shapes = {key: tuple(tensor.shape) for key, tensor in _state({n: model.get_submodule(n) for n in names})}
    for key in sorted(shapes.keys() | tensors.keys()):
        given = tuple(tensors[key].shape) if key in tensors else None
        if shapes.get(key) != given:
            raise ValueError(
                f"{key} must be of the shape that was saved with the masks, {given or 'none'}, the model's is "
                f"{shapes.get(key) or 'none'}: load the base with as many classes, or words, as then"
            )


@torch.no_grad()
def put_saved_tensors(model: nn.Module, names: Iterable[str], tensors: Mapping[str, Tensor]) -> None:
    """What saved_tensors gave, into the modules of these names, which are trained from here on."""
    train_whole(model, names)
    for key, tensor in _state(saved_modules(model)):
        tensor.copy_(tensors[key])


def _state(modules: Mapping[str, nn.Module]) -> Iterable[tuple[str, Tensor]]:
    return ((f"{name}.{key}", tensor) for name in modules for key, tensor in modules[name].state_dict().items())


def _find(model: nn.Module, name: str) -> Any:
    found: Any = model
    for part in name.split("."):
        found = getattr(found, part, None)
    return found
