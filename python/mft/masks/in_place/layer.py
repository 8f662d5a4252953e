"""A masked layer, and the ordinary layer that replaces it while the mask is in the weight."""

from typing import Any

import torch
from torch import Tensor, nn

from mft.masks.convert import replace_module
from mft.masks.masked_experts import Layout, layout, restore_layout, unmask_experts
from mft_kernels import MaskedLayer, MaskedLinear
from mft_kernels.internal import MaskedInPlace, is_seen_by_others, try_linear, why_lost

#: The most tokens that our product serves. On a Xeon with AMX it takes 0.3 to 1.0 of the time of torch's product, if
#: the weight has left the cache, as in a model. From the cache fp32 takes up to 1.7 times as long (576 x 1536).
FEW = 16


class _Holder(nn.Linear):
    """An nn.Linear whose weight holds a mask. It generates by our kernels, which read a weight faster."""

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.weight = weight
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        given = x, self.weight, self.bias
        is_few = x.is_cpu and x.numel() <= FEW * self.in_features and not torch.is_grad_enabled()
        y = try_linear(*given) if is_few and not is_seen_by_others(*given) else None
        return nn.functional.linear(*given) if y is None else y


class InPlaceLayer:
    """One masked layer, and the ordinary layer that replaces it.

    At each moment of enter() and leave() the model computes with the mask, and state_dict() has the whole weight.

    parameter: the ordinary layer's weight, on the masked layer's memory or (if is_copy) on a copy.
    held: the mask that is in the weight.
    """

    def __init__(self, model: nn.Module, name: str, module: MaskedLayer, *, is_copy: bool) -> None:
        self.name, self.module, self._model = name, module, model
        weight = module.weight.detach()
        self._sums = None if is_copy else _sums(weight)
        self.parameter = nn.Parameter(weight.clone() if is_copy else weight, requires_grad=True)
        self.held = MaskedInPlace(self.parameter.detach())
        self.own: tuple[str, str | None] = ("weight", "bias")  # names of the ordinary layer's parameters
        self.path = ""  # of the masked layer, from the module that has these parameters
        self._layout: Layout | None = None
        self._holder: Any
        if isinstance(module, MaskedLinear):
            self._holder = _Holder(self.parameter, module.bias).train(module.training)
        else:
            path, _, part = name.rpartition(".")
            self._holder = model.get_submodule(path)
            self._layout = layout(self._holder)
            self.own, self.path = (part, self._holder._projections[part].bias), f"{part}."
        self._hooks: list[Any] = []

    def enter(self, packed: Tensor) -> None:
        """Put this mask in the weight, and the ordinary layer in the model."""
        self.module.scores.requires_grad_(False)
        for each in (self._holder, self.module):
            self._hooks.append(each.register_state_dict_post_hook(_SavesBase(self)))
            self._hooks.append(each.register_load_state_dict_pre_hook(self._refuse_to_load))
        self.held.change(packed)
        if self._layout is None:
            replace_module(self._model, self.name, self._holder)
        else:
            unmask_experts(self._holder, self.own[0], self.parameter, self.module.bias)

    def leave(self) -> None:
        """Put the masked layer in the model, on its whole weight. Repeat it after an exception, here or in enter()."""
        self.module.scores.requires_grad_(self.module.scores.is_floating_point())
        self.module.train(self._holder.training)
        if self._layout is None:
            replace_module(self._model, self.name, self.module)
        else:
            restore_layout(self._holder, self._layout)
        self.held.lift()
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def is_written(self) -> bool:
        """Whether the masked layer's weight differs from the original. Call after leave()."""
        return self._sums is not None and not torch.equal(_sums(self.module.weight.detach()), self._sums)

    def check_there(self) -> None:
        """Raise RuntimeError if the parameter is not the memory that the mask is held in."""
        if hasattr(self.parameter, "full_tensor") or self.parameter.data_ptr() != self.held.weight.data_ptr():
            raise RuntimeError(
                f"the weight of {self.name} must stay where it is while masks are in place, got one that was moved, "
                "cast or spread over processes: do that before mft.in_place"
            )

    def _refuse_to_load(self, *_: Any) -> None:
        raise RuntimeError(
            f"state_dict must be loaded before masks are in place, or after, got one for {self.name} while they are: "
            "leave mft.in_place first"
        )


class _SavesBase:
    """State-dict hook of both layers: saves the masked layer's entries, with the whole weight."""

    def __init__(self, layer: InPlaceLayer) -> None:
        self.layer = layer

    def __call__(self, holder: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
        if holder is self.layer.module:
            state[f"{prefix}weight"] = self.layer.held.whole()
            return
        for own in self.layer.own:
            state.pop(f"{prefix}{own}", None)
        state |= self.layer.module.state_dict(prefix=f"{prefix}{self.layer.path}")


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


def _sums(weight: Tensor) -> Tensor:
    """Return one checksum per row, (N,) or (E * N,): the sum of bits * random odd numbers, one per column, mod 2**64.

    Each changed weight changes its row's sum; two changes in one row cancel with a probability of at most 2**-33.
    """
    bits = weight.contiguous().view(torch.int16 if weight.itemsize == 2 else torch.int32).flatten(0, -2)
    products = 1 << 16 if weight.is_cpu else 1 << 22  # at once: in a core's cache; a GPU wants few launches
    generator = torch.Generator().manual_seed(0)
    odd = torch.randint(-(2**62), 2**62, bits.shape[1:], generator=generator).mul_(2).add_(1).to(weight.device)
    return torch.cat([(part * odd).sum(-1) for part in bits.split(max(1, products // bits.shape[1]))])
