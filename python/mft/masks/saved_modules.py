"""modules_to_save, as in PEFT: modules that are trained whole in addition to the masks, saved with them, and restored.

A fresh head needs this; otherwise it would stay frozen at random values. Unlike in PEFT, no copy is made: the module
itself is trained, and so is any module whose weights are tied to it.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from mft.checks import nearest
from mft.models.attached import attach, attached


def select_saved_modules(model: nn.Module, patterns: Iterable[str] | None) -> list[str]:
    """Return the names of the modules that match patterns, by suffix as in target_modules; the outermost if nested.

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
    """Return whether name is one of these modules or lies inside one."""
    return any(f"{name}.".startswith(f"{outer}.") for outer in modules)


def train_whole(model: nn.Module, names: Iterable[str]) -> None:
    """Make the modules of these names trainable, and record them on the model."""
    attach(model, modules_to_save=tuple(names))
    for module in saved_modules(model).values():
        module.requires_grad_(True)


def saved_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules that are trained whole, by name."""
    return {name: model.get_submodule(name) for name in attached(model).modules_to_save}


def saved_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return CPU copies of the whole state_dict of the modules that are trained whole."""
    state = _state(saved_modules(model))
    return {key: tensor.detach().to("cpu", copy=True).contiguous() for key, tensor in state}


def check_saved_tensors(model: nn.Module, names: Iterable[str], tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless model has modules of these names whose tensors have exactly these names and shapes."""
    there = {name for name, _ in model.named_modules(remove_duplicate=False)}
    missing = [name for name in names if name not in there]
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
                f"{shapes.get(key) or 'none'}: load the base with the number of classes, or words, that it had then"
            )


@torch.no_grad()
def put_saved_tensors(model: nn.Module, names: Iterable[str], tensors: Mapping[str, Tensor]) -> None:
    """Copy the tensors of saved_tensors into the modules of these names, which are trained from now on."""
    train_whole(model, names)
    for key, tensor in _state(saved_modules(model)):
        tensor.copy_(tensors[key])


def _state(modules: Mapping[str, nn.Module]) -> Iterable[tuple[str, Tensor]]:
    return ((f"{name}.{key}", tensor) for name in modules for key, tensor in modules[name].state_dict().items())
