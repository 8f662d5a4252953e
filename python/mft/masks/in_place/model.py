"""Masks in place: the masked layers of a model become ordinary ones, with the mask in the weight itself.

    masked model     MaskedLinear(weight, scores)    its forward masks
    in place         nn.Linear(where(keep, weight, 0)), trainable; dropped values and scores are stored separately

Autograd, torch.compile, fused modules and inference engines then see an ordinary dense layer. The base is not lost:
state_dict() has the whole weight and the scores, as in the masked model, and close() restores that model bit for bit.
Memory that is not this model's alone is copied before it is written.
"""

import contextlib
from collections.abc import Collection, Iterator, Mapping

from torch import Tensor, nn

from mft.masks.convert import check_unwrapped, masked_modules
from mft.masks.in_place.layer import InPlaceLayer, check_layer
from mft.masks.in_place.others_memory import layers_to_copy
from mft.models.attached import attach, attached
from mft.models.parallel import check_unsharded


class MasksInPlace:
    """Keeps the masks of a model in its weights until close().

    Args:
        model: of mask_model, over exact weights; as for masked_modules.
        packed: the packed masks by layer name; None selects them from the scores now.
        copied: the layers whose weight is copied before it is written; None: those of layers_to_copy.
    Raises: ValueError if nothing is masked, or if a layer cannot be in place; NonFiniteScores. The model is then
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
            check_layer(name, module)
        copied = layers_to_copy(model, masked) if copied is None else copied
        bits = {name: module.packed_mask() for name, module in masked.items()} if packed is None else packed
        self.model = model
        self.layers: list[InPlaceLayer] = []
        self.is_held = False  # whether all layers hold their masks; False for good if an exception stopped a change
        self._written: str | None = None  # the first layer whose weight something else has changed
        try:
            attach(model, in_place=self)
            for name, module in masked.items():
                self.layers.append(InPlaceLayer(model, name, module, is_copy=name in copied))
                self.layers[-1].enter(bits[name])
            self.is_held = True
        finally:
            if not self.is_held:
                self.close()

    def close(self) -> None:
        """Restore the masked model on its original weights, or finish that. An interrupt is raised afterwards.

        Raises: RuntimeError if something has written to the weights; all layers are restored even then.
        """
        try:
            self._restore()
        finally:
            self._restore()
        if self._written is not None:
            raise RuntimeError(
                f"the weight of {self._written} must not be written while masks are in place, but kept elements have "
                "changed: give an optimiser none of model.parameters(), and load the base again"
            )

    @contextlib.contextmanager
    def use_whole_weights(self) -> Iterator[None]:
        """Make the ordinary layers compute with their whole weights, as the base, in this context."""
        packed = self._begin_change()
        for layer in self.layers:
            layer.held.lift()
        try:
            yield
        finally:
            for layer, bits in zip(self.layers, packed):
                layer.held.change(bits)
            self.is_held = True

    @contextlib.contextmanager
    def use_masked_layers(self) -> Iterator[None]:
        """Make the model the masked one, on its whole weights, in this context."""
        packed = self._begin_change()
        for layer in reversed(self.layers):
            layer.leave()
        attach(self.model, in_place=None)
        try:
            yield
        finally:
            attach(self.model, in_place=self)
            for layer, bits in zip(self.layers, packed):
                layer.enter(bits)
            self.is_held = True

    def _restore(self) -> None:
        """Do what is left to do; an exception may stop it anywhere. The model's attribute is the last that goes."""
        self.is_held = False
        if masks_in_place(self.model) is not self:
            return
        while self.layers:
            layer = self.layers[-1]
            layer.leave()
            if layer.is_written():
                self._written = layer.name
            self.layers.pop()
        attach(self.model, in_place=None)

    def _begin_change(self) -> list[Tensor]:
        """Return the masks that the layers hold. Raises RuntimeError if an exception has stopped an earlier change."""
        if not self.is_held:
            raise RuntimeError(
                "masks must be wholly in place here, got a model on which an interrupt stopped mft.in_place: call "
                "mft.leave_in_place(model)"
            )
        self.is_held = False
        packed = [layer.held.packed for layer in self.layers]
        return [bits for bits in packed if bits is not None]


def masks_in_place(model: nn.Module) -> MasksInPlace | None:
    """Return the object that has model's masks in place; None if there is none."""
    return attached(model).in_place


@contextlib.contextmanager
def use_masked_layers(model: nn.Module) -> Iterator[None]:
    """Make model the masked one on its whole base in this context, if its masks are in place; else do nothing."""
    found = masks_in_place(model)
    with contextlib.nullcontext() if found is None else found.use_masked_layers():
        yield
