"""The memory mode resident: run micro-batches one by one, with all weights, masks and gradients on the device."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mft.data.batches import MicroBatch
from mft.engines.layer_engine import LayerEngine, tensors_of
from mft.engines.step import OnLoss


class Resident(LayerEngine):
    """Keeps all weights, masks and gradient buffers on the device; runs one micro-batch after another."""

    def __init__(self, *args, **options) -> None:
        super().__init__(*args, **options)
        elsewhere = {id(mask.module.scores) for mask in self.masks} | {id(t) for t in self.embedding_alone()}
        for tensor in tensors_of(self.calls.model):
            if id(tensor) in elsewhere:
                tensor.data = self.mover.rest(tensor.data)
            else:
                tensor.data = tensor.data.to(self.mover.device)
        for mask in self.masks:
            mask.packed = mask.packed.to(self.mover.device)
            mask.hold(self.states.new_buffer(mask, self.grad_dtype) if self.trains else None)

    def step(
        self, batches: Sequence[MicroBatch], scale: float, lr: float | None, max_norm: float | None, on_loss: OnLoss
    ) -> None:
        masks = self.masks
        for mask in masks:
            assert mask.grad is not None
            mask.grad.zero_()
        with self.states.processes.together():
            self.objective.prepare(batches)
            for batch in batches:
                boundaries: list[Tensor] = []
                hidden, base = self._climb(batch, boundaries)
                total, grad = self.loss(batch, hidden, scale, base)
                del hidden, base
                on_loss(batch, total)
                top = [grad]
                del grad  # so that _descend can free it
                self._descend(batch, boundaries, top)
        if lr is None:
            return
        with self._name_place("the optimiser step"):
            self.states.update(masks, lr, max_norm)
            self.states.select()

    def hidden_states(self, batches: Sequence[MicroBatch]) -> Iterator[Tensor]:
        for batch in batches:
            hidden = self.enter(batch)
            for layer in range(self.depth):
                hidden = self.forward_layer(layer, hidden, batch)
            with torch.no_grad():
                yield self.calls.leave(batch.input_ids.to(self.mover.device), hidden)

    def _climb(self, batch: MicroBatch, boundaries: list[Tensor]) -> tuple[Tensor, Tensor | None]:
        """Return the last layer's output, and the base's if needed; append the masked layers' inputs to boundaries."""
        hidden = self._below(batch)
        base = self._climb_base(batch, hidden) if self.objective.needs_reference(batch) else None
        for layer in range(self.first, self.depth):
            boundaries.append(self.mover.store(hidden))
            hidden = self.forward_layer(layer, hidden, batch)
        self.mover.let_go()
        return hidden, base

    def _climb_base(self, batch: MicroBatch, hidden: Tensor) -> Tensor:
        """Return the base model's output for hidden, the input of the first masked layer."""
        for layer in range(self.first, self.depth):
            hidden = self.forward_base_layer(layer, hidden, batch)
        return hidden

    def recall(self, batches: Sequence[MicroBatch]) -> None:
        for batch in batches:
            if self.objective.remembers and self.objective.needs_reference(batch):
                self.remember_base(batch, self._climb_base(batch, self._below(batch)))
            elif self.memory is not None:
                self._below(batch)

    def _below(self, batch: MicroBatch) -> Tensor:
        """Return the input of the first masked layer."""
        for unknown in self.batches_without_calls([batch]):
            self.enter(unknown)
        hidden = self.remembered(batch)
        if hidden is None:
            hidden = self.enter(batch)
            for layer in range(self.first):
                hidden = self.forward_layer(layer, hidden, batch)
            self.remember(batch, hidden)
        return hidden

    def _descend(self, batch: MicroBatch, boundaries: list[Tensor], grads: list[Tensor]) -> None:
        """Run the backward passes of all layers. grads holds the last layer's gradient; both lists are consumed."""
        arriving = self.mover.bring(boundaries[-1:])
        for layer in reversed(range(self.first, self.depth)):
            (hidden,) = arriving.wait()
            self.mover.give_back(boundaries.pop())
            arriving = self.mover.bring(boundaries[-1:])
            d_hidden = self.backward_layer(layer, hidden, grads.pop(), batch)
            grads += [] if d_hidden is None else [d_hidden]
            del d_hidden

    def close(self) -> None:
        super().close()
        for tensor in self.embedding_alone():  # all of the model but the scores is then on the device
            tensor.data = tensor.data.to(self.mover.device)

    def _remedy(self) -> str:
        return f"Set memory: layerwise, or: {super()._remedy()}"
