"""Find the weight of a layer in a server's model, which fuses q, k and v, and gate and up, into one matrix.

The model's own load_weights knows the place. It gets a tensor without memory. The copy that it then makes is recorded
instead of done: the copy's destination is the slice.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

Owner = tuple[str, nn.Module]


class Slices:
    """Finds the slices of a model's weights.

    model: has load_weights, which takes (name, tensor) pairs with the checkpoint's names. is_plain: whether a layer
    computes with its parameter as it is in memory.
    """

    def __init__(self, model: nn.Module, is_plain: Callable[[nn.Module], bool]) -> None:
        self._model, self._is_plain = model, is_plain
        self._kind = type(model).__name__
        self._owners = _owners(model)

    def find(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return a view of the layer's weight, to be written. Raises: ValueError if there is not exactly one."""
        if len(shape) != 2:
            raise ValueError(
                f"{name}: masks of experts in one parameter {shape} are not for vLLM, which repacks experts: mft merge "
                "makes each task an ordinary model"
            )
        copies = self._copies(name, shape, dtype)
        if len(copies) != 1:
            raise ValueError(
                f"{name}: its weight must go to one place of vLLM's {self._kind}, got {len(copies)}: mft merge makes "
                "each task an ordinary model"
            )
        target = copies[0].detach().as_subclass(Tensor)  # vLLM's parameters are of subclasses
        owner, layer = self._owners.get(target.untyped_storage().data_ptr(), ("a temporary tensor", nn.Module()))
        if not self._is_plain(layer) or tuple(target.shape) != shape or not target.is_contiguous():
            raise ValueError(
                f"{name}: its weight must lie in vLLM as an ordinary matrix {shape}, got a part of {owner} "
                f"({type(layer).__name__}), which is repacked or not a plain linear layer: mask other layers, or "
                "make each task an ordinary model by mft merge"
            )
        return target

    def layer_of(self, weight: Tensor) -> Any:
        """The layer in whose parameter lies what find gave."""
        return self._owners[weight.untyped_storage().data_ptr()][1]

    def _copies(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
        weight = torch.empty(shape, dtype=dtype, device="meta")
        load: Any = self._model.load_weights
        try:
            with torch.no_grad(), _NotedCopies() as noted:
                load([(f"{name}.weight", weight)])
        except (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(
                f"{name}: the mask is for a weight of {shape}, which vLLM's {self._kind} does not take "
                f"({reason[:200]}): serve the base that it was learned on"
            ) from error
        return noted.targets


class _NotedCopies(TorchFunctionMode):
    """A mode in which copy_ copies nothing and its destinations are recorded."""

    def __init__(self) -> None:
        super().__init__()
        self.targets: list[Tensor] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.Tensor.copy_:
            self.targets.append(args[0])
            return args[0]
        return function(*args, **(kwargs or {}))


def _owners(model: nn.Module) -> dict[int, Owner]:
    """Return {address: (the name of the parameter that lies there, its module)}."""
    return {
        parameter.untyped_storage().data_ptr(): (f"{path}.{name}" if path else name, module)
        for path, module in model.named_modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter.numel()
    }
