"""A masked layer, and the ordinary layer that replaces it while the mask is in the weight."""

from typing import Any

import torch
from torch import nn

from mft.masks.convert import replace_module
from mft.masks.experts import mask_experts, unmask_experts
from mft_kernels import MaskedLayer, MaskedLinear
from mft_kernels.layers.maskable import why_lost
from mft_kernels.layers.shells import linear_on
from mft_kernels.mask.in_place import MaskedInPlace


class InPlaceLayer:
    """One masked layer, and the ordinary layer that replaces it.

    parameter: the ordinary layer's weight, on the masked layer's memory or (if is_copy) on a copy.
    held: the mask that is in the weight.
    """

    def __init__(self, model: nn.Module, name: str, module: MaskedLayer, *, is_copy: bool) -> None:
        self.name, self.module, self._model = name, module, model
        weight = module.weight.detach()
        self._hash = None if is_copy else torch.hash_tensor(weight)
        self.parameter = nn.Parameter(weight.clone() if is_copy else weight, requires_grad=True)
        self.held = MaskedInPlace(self.parameter.detach())
        self._linear: nn.Linear | None = None
        if isinstance(module, MaskedLinear):
            self._linear = linear_on(self.parameter, module.bias).train(module.training)
        self.own: tuple[str | None, ...] = ("weight", "bias")  # names of the ordinary layer's parameters
        self._hooks: list[Any] = []

    def enter(self) -> None:
        """Put the ordinary layer in the model."""
        holder: Any = self._linear
        if holder is not None:
            replace_module(self._model, self.name, holder)
        else:
            holder, part = self._place()
            self.own = (part, holder._projections[part].bias)
            unmask_experts(holder, part, self.parameter, self.module.bias)
        self._hooks = [
            holder.register_state_dict_post_hook(_SavesBase(self)),
            holder.register_load_state_dict_pre_hook(self._refuse_to_load),
        ]

    def leave(self) -> None:
        """Put the masked layer in the model, even if it is there already. The weight may still hold the mask."""
        while self._hooks:
            self._hooks.pop().remove()
        if self._linear is not None:
            self.module.train(self._linear.training)
            replace_module(self._model, self.name, self.module)
            return
        holder, part = self._place()
        if getattr(holder, part) is not self.module:
            mask_experts(holder, part, lambda *_, **__: self.module)

    def check_whole(self) -> None:
        """Raise RuntimeError if the masked layer's weight differs from the original. Call after held.lift()."""
        if self._hash is not None and not torch.equal(torch.hash_tensor(self.module.weight.detach()), self._hash):
            raise RuntimeError(
                f"the weight of {self.name} must not be written while masks are in place, but kept elements have "
                "changed: give an optimiser none of model.parameters(), and load the base again"
            )

    def check_there(self) -> None:
        """Raise RuntimeError if the parameter is not the memory that the mask is held in."""
        if hasattr(self.parameter, "full_tensor") or self.parameter.data_ptr() != self.held.weight.data_ptr():
            raise RuntimeError(
                f"the weight of {self.name} must stay where it is while masks are in place, got one that was moved, "
                "cast or spread over processes: do that before mft.in_place"
            )

    def saved(self, prefix: str) -> dict[str, Any]:
        """Return the masked layer's state_dict with its whole weight; prefix: of the ordinary layer's module."""
        at = prefix if self._linear is not None else f"{prefix}{self.own[0]}."
        return self.module.state_dict(prefix=at) | {f"{at}weight": self.held.whole()}

    def _place(self) -> tuple[Any, str]:
        """Return the experts module, and the name of this layer's parameter in it."""
        path, _, part = self.name.rpartition(".")
        return self._model.get_submodule(path), part

    def _refuse_to_load(self, *_: Any) -> None:
        raise RuntimeError(
            f"state_dict must be loaded before masks are in place, or after, got one for {self.name} while they are: "
            "leave mft.in_place first"
        )


class _SavesBase:
    """State-dict hook: replaces the ordinary layer's entries by the masked layer's."""

    def __init__(self, layer: InPlaceLayer) -> None:
        self.layer = layer

    def __call__(self, holder: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
        for own in self.layer.own:
            state.pop(f"{prefix}{own}", None)
        state |= self.layer.saved(prefix)


def check_layer(name: str, module: MaskedLayer) -> None:
    """Raise ValueError unless the masked layer of this name can be put in place."""
    if getattr(module, "quantized", None) is not None:
        raise ValueError(
            f"masks must lie on exact weights to be in place, got {name}, whose weight is quantised: load the "
            "unquantised model, or train with memory: quantized"
        )
    if why_lost(module) is not None:
        raise ValueError(
            f"{name} must have no hooks of its own, nor a replaced forward, which an ordinary layer in its place would "
            "lose: add them while masks are in place, or dispatch the model to one device"
        )
