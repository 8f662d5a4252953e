"""The memory mode layerwise: run all micro-batches of a step through one layer, then through the next.

Only the weights of the current layer, and of the next one on its way, are on the device.

    up      layer 0: micro-batches 1 .. n | layer 1: 1 .. n | ...      the next layer's weights arrive meanwhile
    loss    micro-batches 1 .. n
    down    layer L-1: n micro-batches, then its scores are updated | layer L-2: ...

Boundaries and their gradients stay in host memory, as do weights and masks (L2L, arXiv 2002.05645, for one optimiser
step; L2L trains weights, this trains scores). The weights of a layer are copied three times per step, for any number of
micro-batches.

If the boundaries of all micro-batches do not fit, a portion of the micro-batches goes up and down, then the next
portion. Between portions the sums of gradients also stay on the host. They continue in the same dtype and order, so no
bit of the result changes. The scores are updated with the last portion.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mft.data.batches import MicroBatch
from mft.engines.layer_engine import LayerEngine, tensors_of
from mft.engines.score_states import HeldMask
from mft.engines.step import OnLoss

Resting = deque[list[Tensor]]  # in host memory; the tensors of one list, such as a micro-batch's, are copied together


@dataclass
class _Top:
    """Micro-batches that have reached their losses, and the data for their way down, which consumes it."""

    batches: Sequence[MicroBatch]
    visits: Iterator[int]  # of the layers, from the last down to the first masked one
    boundaries: list[Resting]  # each of these layers' inputs, by micro-batch
    grads: Resting  # gradients of the next layer's output, by micro-batch


class Layerwise(LayerEngine):
    """Keeps weights, masks and boundaries in host memory, and two layers' weights and one's gradients on the device."""

    def __init__(self, *args, **options) -> None:
        super().__init__(*args, **options)
        self._outside = self.depth  # the group of tensors outside all layers: norm and head, without the embedding
        self._groups = [self._tensors_of_layer(i) for i in range(self.depth)] + [self._tensors_outside()]
        for tensor in (*self.embedding_alone(), *(t for group in self._groups for t in group)):
            tensor.data = self.mover.rest(tensor.data)
        for mask in self.masks:
            mask.hold(None)
        self._updated: list[HeldMask] = []  # in the layer that is on the device

    def step(
        self, batches: Sequence[MicroBatch], scale: float, lr: float | None, max_norm: float | None, on_loss: OnLoss
    ) -> None:
        if max_norm is not None:
            raise ValueError(
                f"train.max_grad_norm must be null with memory: layerwise, got {max_norm:g}: a layer's scores are "
                "updated before the gradients below it exist, so there is no global norm; memory: resident has one"
            )
        size = self.at_once or len(batches)
        *earlier, last = (batches[i : i + size] for i in range(0, len(batches), size))
        sums = Resting()
        with self.states.processes.together():
            self.objective.prepare(batches)
            for portion in earlier:
                top = self._climb(portion, scale, on_loss)
                buffers, sums = self._buffers(sums), Resting()
                for layer in reversed(range(self.first, self.depth)):
                    self._descend(layer, top, next(buffers))
                    sums.append(self._set_aside(layer))
                _check_done(top.visits)
                _check_done(buffers)
            top, buffers = self._climb(last, scale, on_loss), self._buffers(sums)
        for layer in reversed(range(self.first, self.depth)):
            with self.states.processes.together():
                self._descend(layer, top, next(buffers))
            self._update(layer, lr)
        _check_done(top.visits)
        _check_done(buffers)
        if lr is not None:
            with self._name_place("the selection of the masks"):
                self.states.select()

    def recall(self, batches: Sequence[MicroBatch]) -> None:
        referring = [batch for batch in batches if self.objective.remembers and self.objective.needs_reference(batch)]
        if referring:
            self._recall_base(batches, referring)
            return
        if self.memory is None or self._cached_outputs(batches) is not None:
            return
        visits = self._visit([self._outside, *range(self.first)])
        for (hidden,) in self._below(batches, visits):
            self.mover.give_back(hidden)
        _check_done(visits)

    def hidden_states(self, batches: Sequence[MicroBatch]) -> Iterator[Tensor]:
        visits = self._visit([self._outside, *range(self.depth), self._outside])
        hidden = self._enter(batches, visits)
        for _ in range(self.depth):
            hidden = self._forward_batches(next(visits), hidden, batches)
        next(visits)
        for batch, (state,) in zip(batches, self._take_each(hidden)):
            with torch.no_grad():
                yield self.calls.leave(batch.input_ids.to(self.mover.device), state)
        _check_done(visits)

    # ------------------------------------------------------------------------------------------ one layer at a time

    def _climb(self, batches: Sequence[MicroBatch], scale: float, on_loss: OnLoss) -> _Top:
        """Run all batches from their tokens to their losses."""
        masked = range(self.first, self.depth)
        visits, hidden = self._begin(batches, [*masked, self._outside, *reversed(masked)])
        referring = [batch for batch in batches if self.objective.needs_reference(batch)]
        base = Resting()
        boundaries: list[Resting] = []
        for _ in masked:
            layer = next(visits)
            boundaries.append(hidden)
            base = self._forward_base_batches(layer, base, hidden, batches, referring)
            hidden = self._forward_batches(layer, hidden, batches, keep=True)
        next(visits)
        grads = self._losses(batches, hidden, base, referring, scale, on_loss)
        return _Top(batches, visits, boundaries, grads)

    def _begin(self, batches: Sequence[MicroBatch], order: list[int]) -> tuple[Iterator[int], Resting]:
        """Return visits of order, and the inputs of the first masked layer: cached, or by visits of those below it."""
        start = self._cached_outputs(batches)
        if start is not None:
            return self._visit(order), start
        visits = self._visit([self._outside, *range(self.first), *order])
        return visits, self._below(batches, visits)

    def _enter(self, batches: Sequence[MicroBatch], visits: Iterator[int]) -> Resting:
        next(visits)
        return deque(self._rest(self.enter(batch)) for batch in batches)

    def _below(self, batches: Sequence[MicroBatch], visits: Iterator[int]) -> Resting:
        """Return the inputs of the first masked layer, and cache them."""
        hidden = self._enter(batches, visits)
        for _ in range(self.first):
            hidden = self._forward_batches(next(visits), hidden, batches)
        if self.memory is not None:
            self.mover.finish()
            for batch, (state,) in zip(batches, hidden):
                self.remember(batch, state.clone() if self.mover.separate else state)  # clone: the buffer is reused
        return hidden

    def _forward_batches(
        self, layer: int, hidden: Resting, batches: Sequence[MicroBatch], *, keep: bool = False
    ) -> Resting:
        """Run one layer on the hidden states of all micro-batches. The inputs' memory is reused unless keep is set."""
        states = self.mover.bring_each(hidden) if keep else self._take_each(hidden)
        return deque(self._rest(self.forward_layer(layer, state, batch)) for batch, (state,) in zip(batches, states))

    def _forward_base_batches(
        self, layer: int, base: Resting, hidden: Resting, batches: Sequence[MicroBatch], referring: list[MicroBatch]
    ) -> Resting:
        """Run the layer with all weights kept, for the batches in referring; the first one starts from hidden."""
        if not referring:
            return base
        if layer == self.first:
            states = self.mover.bring_each([state for batch, state in zip(batches, hidden) if batch in referring])
        else:
            states = self._take_each(base)
        return deque(
            self._rest(self.forward_base_layer(layer, state, batch)) for batch, (state,) in zip(referring, states)
        )

    def _recall_base(self, batches: Sequence[MicroBatch], referring: list[MicroBatch]) -> None:
        visits, hidden = self._begin(batches, [*range(self.first, self.depth), self._outside])
        base = Resting()
        for _ in range(self.first, self.depth):
            base = self._forward_base_batches(next(visits), base, hidden, batches, referring)
        next(visits)
        for batch, (state,) in zip(referring, self._take_each(base)):
            self.remember_base(batch, state)
        for (state,) in hidden:
            self.mover.give_back(state)
        _check_done(visits)

    def _losses(
        self,
        batches: Sequence[MicroBatch],
        hidden: Resting,
        base: Resting,
        referring: list[MicroBatch],
        scale: float,
        on_loss: OnLoss,
    ) -> Resting:
        totals, grads, bases = [], Resting(), self._take_each(base)
        for batch, (state,) in zip(batches, self._take_each(hidden)):
            total, grad = self.loss(batch, state, scale, *(next(bases) if batch in referring else ()))
            totals.append(total)
            grads.append(self._rest(grad))
        for batch, total in zip(batches, totals):
            on_loss(batch, total)
        return grads

    def _buffers(self, sums: Resting) -> Iterator[list[Tensor]]:
        """Yield each layer's gradient buffers on the device, from the last layer down: from sums if any, else zeros."""
        if sums:
            yield from self._take_each(sums)
            return
        for layer in reversed(range(self.first, self.depth)):
            yield [self.states.new_buffer(mask, self.grad_dtype) for mask in self.masks_of_layer[layer]]

    def _descend(self, layer: int, top: _Top, buffers: Sequence[Tensor]) -> None:
        """Run the backward pass of one layer for all micro-batches of top. Its masks add into buffers and keep them."""
        next(top.visits)
        for mask, buffer in zip(self.masks_of_layer[layer], buffers, strict=True):
            mask.hold(buffer)
        inputs = Resting()
        arriving = self._take_each(top.boundaries.pop()), self._take_each(top.grads)
        for batch, (hidden,), (grad,) in zip(top.batches, *arriving):
            d_hidden = self.backward_layer(layer, hidden, grad, batch)
            if d_hidden is not None:
                inputs.append(self._rest(d_hidden))
        top.grads = inputs

    def _set_aside(self, layer: int) -> list[Tensor]:
        """Move the layer's gradient sums to host memory until the next portion of micro-batches."""
        grads = []
        for mask in self.masks_of_layer[layer]:
            assert mask.grad is not None, "_descend has given it a buffer"
            grads += self._rest(mask.grad)
            mask.hold(None)
        self.mover.let_go()
        return grads

    def _update(self, layer: int, lr: float | None) -> None:
        """Take the layer's optimiser step unless lr is None, and release its buffers."""
        masks = self.masks_of_layer[layer]
        if masks and lr is not None:
            with self._name_place(f"the optimiser step of layer {layer}"):
                self.states.update(masks, lr)
            self._updated = masks
        for mask in masks:
            mask.hold(None)

    def _rest(self, *tensors: Tensor) -> list[Tensor]:
        """Copy tensors from the device to host memory."""
        return [self.mover.store(tensor) for tensor in tensors]

    def _take_each(self, resting: Resting) -> Iterator[list[Tensor]]:
        """Do the same as Mover.bring_each, but empty resting and let the memory of its tensors be reused."""

        def take() -> Iterator[list[Tensor]]:
            while resting:
                tensors = resting.popleft()
                yield tensors
                for tensor in tensors:
                    self.mover.give_back(tensor)

        return self.mover.bring_each(take())

    def _visit(self, order: list[int]) -> Iterator[int]:
        """Yield each group's number while its tensors are on the device; the next group is copied meanwhile."""
        arriving = self.mover.bring_each(self._groups[number] for number in order)
        for number in order:
            group, arrived = self._groups[number], next(arriving)
            resting = [tensor.data for tensor in group]
            for tensor, copy in zip(group, arrived):
                tensor.data = copy
            del arrived
            try:
                yield number
            finally:
                changed, self._updated = {id(mask.packed) for mask in self._updated}, []
                for tensor, data in zip(group, resting):
                    if id(tensor) in changed:
                        self.mover.store(tensor.data, out=data)
                    tensor.data = data

    def _cached_outputs(self, batches: Sequence[MicroBatch]) -> Resting | None:
        lacking = self.batches_without_calls(batches)
        for _ in self._visit([self._outside] if lacking else []):
            for batch in lacking:
                self.enter(batch)
        states = [self.remembered(batch) for batch in batches]
        return deque(self._rest(s) for s in states if s is not None) if all(s is not None for s in states) else None

    def _tensors_of_layer(self, index: int) -> list[Tensor]:
        masks = self.masks_of_layer[index]
        scores = {id(mask.module.scores) for mask in masks}
        tensors = [*tensors_of(self.calls.layers[index]), *(mask.packed for mask in masks)]
        return list({id(t): t for t in tensors if id(t) not in scores}.values())

    def _tensors_outside(self) -> list[Tensor]:
        inside = {id(t) for layer in self.calls.layers for t in tensors_of(layer)}
        inside |= {id(t) for t in self.embedding_alone()}
        return [t for t in tensors_of(self.calls.model) if id(t) not in inside]


def _check_done(visits: Iterator[object]) -> None:
    """Finish the iterator, which releases the last group or buffers; all of them must have been visited."""
    for _ in visits:
        raise AssertionError("a layer was not visited")
