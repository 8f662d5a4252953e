"""Masks in place: a masked model whose masked layers are ordinary ones, with the mask in the weight itself.

    masked model     MaskedLinear(weight, scores)    its forward masks
    in place         nn.Linear(where(keep, weight, 0)), trainable; dropped values and scores lie aside

Autograd, torch.compile, fused modules and inference engines then see an ordinary dense layer. The base is not lost:
state_dict() has the whole weight and the scores, as the masked model has, and close() gives back that model, bit for
bit. What is no memory of this model's alone is copied before it is written.
"""

import contextlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mft.files.mapped import Mappings
from mft.masks.convert import IN_PLACE, check_unwrapped, masked_modules, replace_module
from mft.masks.experts import mask_experts, unmask_experts
from mft.models.parallel import check_unsharded
from mft_kernels import MaskedLayer, MaskedLinear
from mft_kernels.layers.maskable import why_lost
from mft_kernels.layers.shells import linear_on
from mft_kernels.mask.in_place import MaskedInPlace

_LENT = "_mft_lent"  # whether another model lies on the same memory; an attribute of the model


class InPlaceLayer:
    """One masked layer, and the ordinary one in its place.

    parameter: the ordinary one's weight, on the masked layer's memory or (is_copy) on its own. held: the mask in it.
    """

    def __init__(self, model: nn.Module, name: str, module: MaskedLayer, *, is_copy: bool) -> None:
        self.name, self.module, self._model = name, module, model
        weight = module.weight.detach()
        self._hash = None if is_copy else torch.hash_tensor(weight)
        self.parameter = nn.Parameter(weight.clone() if is_copy else weight, requires_grad=True)
        self.held = MaskedInPlace(self.parameter.detach())
        self._linear = linear_on(self.parameter, module.bias) if isinstance(module, MaskedLinear) else None
        self.own: tuple[str | None, ...] = ("weight", "bias")  # what its holder calls the ordinary layer's parameters
        self._hooks: list[Any] = []

    def enter(self) -> None:
        """The ordinary layer stands in the model."""
        holder: Any = self._linear
        if holder is not None:
            replace_module(self._model, self.name, holder.train(self.module.training))
        else:
            holder, part = self._place()
            self.own = (part, holder._projections[part].bias)
            unmask_experts(holder, part, self.parameter, self.module.bias)
        self._hooks = [
            holder.register_state_dict_post_hook(_SavesBase(self)),
            holder.register_load_state_dict_pre_hook(self._refuse_to_load),
        ]

    def leave(self) -> None:
        """The masked layer stands there, whether the ordinary one did or not; the weight may hold its mask still."""
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
        """Raise RuntimeError unless the masked layer has the weight that it had; after held.lift()."""
        if self._hash is not None and not torch.equal(torch.hash_tensor(self.module.weight.detach()), self._hash):
            raise RuntimeError(
                f"the weight of {self.name} must not be written while masks are in place, but kept elements have "
                "changed: give an optimiser none of model.parameters(), and load the base again"
            )

    def check_there(self) -> None:
        """Raise RuntimeError unless the parameter lies where the mask is held."""
        if hasattr(self.parameter, "full_tensor") or self.parameter.data_ptr() != self.held.weight.data_ptr():
            raise RuntimeError(
                f"the weight of {self.name} must stay where it was when masks came in place, got one that was moved, "
                "cast or spread over processes: do that before"
            )

    def saved(self, prefix: str) -> dict[str, Any]:
        """What the masked layer has in a state_dict, its weight whole; prefix: of what holds the ordinary layer."""
        at = prefix if self._linear is not None else f"{prefix}{self.own[0]}."
        return self.module.state_dict(prefix=at) | {f"{at}weight": self.held.whole()}

    def _place(self) -> tuple[Any, str]:
        """The experts, and which of their parameters it is."""
        path, _, part = self.name.rpartition(".")
        return self._model.get_submodule(path), part

    def _refuse_to_load(self, *_: Any) -> None:
        raise RuntimeError(
            f"state_dict must be loaded before masks are in place, or after, got one for {self.name} while they are: "
            "leave mft.in_place first"
        )


class _SavesBase:
    """A hook of state_dict: what the masked layer saves, in place of what the ordinary one has just saved."""

    def __init__(self, layer: InPlaceLayer) -> None:
        self.layer = layer

    def __call__(self, holder: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
        for own in self.layer.own:
            state.pop(f"{prefix}{own}", None)
        state |= self.layer.saved(prefix)


class MasksInPlace:
    """The masks of a model in its weights, until close().

    Args:
        model: of mask_model, over exact weights; what masked_modules takes.
        packed: the masks by layer's name; None: those that the scores select now.
        copied: the layers whose weight is copied before it is written; None: those of layers_to_copy.
    Raises: ValueError if nothing is masked, or a layer cannot be in place; NonFiniteScores. The model is then
        unchanged.
    """

    def __init__(
        self,
        model: nn.Module,
        packed: Mapping[str, Tensor] | None = None,
        copied: Collection[str] | None = None,
    ) -> None:
        check_unwrapped(model)
        check_unsharded(model)
        masked = masked_modules(model)
        if not masked:
            raise ValueError(
                f"model must have masked layers, got a {type(model).__name__} without: mask_model or load_masks first"
            )
        for name, module in masked.items():
            _check_layer(name, module)
        self.model = model
        copied = layers_to_copy(model, masked) if copied is None else copied
        bits = {name: module.packed_mask() for name, module in masked.items()} if packed is None else packed
        self.layers: list[InPlaceLayer] = []
        with contextlib.ExitStack() as undo:
            undo.callback(self.close)
            setattr(model, IN_PLACE, self)
            for name, module in masked.items():
                layer = InPlaceLayer(model, name, module, is_copy=name in copied)
                self.layers.append(layer)
                layer.held.change(bits[name])
                layer.enter()
            undo.pop_all()

    def close(self) -> None:
        """The model is the masked one again, on the weights that it had.

        Raises: RuntimeError if somebody has written them; all layers are back all the same.
        """
        if masks_in_place(self.model) is self:
            delattr(self.model, IN_PLACE)
        back: list[InPlaceLayer] = []
        while self.layers:
            self.layers[-1].held.lift()
            self.layers[-1].leave()
            back.append(self.layers.pop())
        for layer in back:
            layer.check_whole()

    @contextlib.contextmanager
    def lifted(self) -> Iterator[None]:
        """Meanwhile the ordinary layers compute with their whole weights: the base."""
        packed = [layer.held.packed for layer in self.layers]
        try:
            for layer in self.layers:
                layer.held.lift()
            yield
        finally:
            for layer, bits in zip(self.layers, packed):
                assert bits is not None, "a layer in place holds a mask"
                layer.held.change(bits)

    @contextlib.contextmanager
    def masked_again(self) -> Iterator[None]:
        """Meanwhile the model is the masked one, on its whole weights."""
        with self.lifted():
            delattr(self.model, IN_PLACE)
            try:
                for layer in self.layers:
                    layer.leave()
                yield
            finally:
                for layer in self.layers:
                    layer.enter()
                setattr(self.model, IN_PLACE, self)


def masks_in_place(model: nn.Module) -> MasksInPlace | None:
    """What has model's masks in place; None if nothing has."""
    return getattr(model, IN_PLACE, None)


@contextlib.contextmanager
def as_masked(model: nn.Module) -> Iterator[None]:
    """Meanwhile model is the masked one on its whole base, if its masks are in place; else it is what it is."""
    found = masks_in_place(model)
    with contextlib.nullcontext() if found is None else found.masked_again():
        yield


def layers_to_copy(model: nn.Module, masked: Mapping[str, MaskedLayer]) -> set[str]:
    """Those whose weight is not this model's alone: mapped from a file, shared with processes, modules or models."""
    if getattr(model, _LENT, False):
        return set(masked)
    mappings = Mappings()
    others = [
        (module, *_span(tensor))
        for module in model.modules()
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False))
    ]
    found = set()
    for name, layer in masked.items():
        weight = layer.weight
        device, start, end = _span(weight)
        tied = any(
            module is not layer and other == device and start < its_end and its_start < end
            for module, other, its_start, its_end in others
        )
        if tied or (weight.is_cpu and (weight.is_shared() or mappings.hold(start))):
            found.add(name)
    return found


def lend_weights(model: nn.Module) -> None:
    """From now on another model lies on the same memory."""
    setattr(model, _LENT, True)


# ---------------------------------------------------------------------------------------------- private


def _check_layer(name: str, module: MaskedLayer) -> None:
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


def _span(tensor: Tensor) -> tuple[torch.device, int, int]:
    """Device, first address and the one behind the last."""
    elements = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride())) + 1
    start = tensor.data_ptr()
    return tensor.device, start, start + (elements * tensor.itemsize if tensor.numel() else 0)
