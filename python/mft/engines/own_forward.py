"""The model's own forward: a reader, and the base class of the runners of plain, in_place and sharded."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from mft.data.batches import MicroBatch
from mft.engines.placed import Placed
from mft.engines.step import OnLoss, Reader, Runner, naming_lack_of_memory
from mft.masks.base_pass import use_whole_weights
from mft.models.causal_lm import Run, evaluating
from mft.models.frozen_layers import FrozenPrefix
from mft.models.longrope import inputs_of


class Forward(Reader):
    """Runs a model that nothing trains. run, head: see causal_lm.split_at_head."""

    together = 1

    def __init__(self, placed: Placed, run: Run, head: nn.Module) -> None:
        self.model, self.head = placed.model, head
        self._prefix = FrozenPrefix(placed.model, placed.first, placed.memory, run)
        self._device = next(placed.model.parameters()).device

    @torch.no_grad()
    def hidden_states(self, batches: Sequence[MicroBatch]) -> Iterator[Tensor]:
        for batch in batches:
            ids, positions = inputs_of(batch, self.model, self._device)
            yield self._prefix(ids, batch.rows, positions)


class OwnForward(Runner):
    """Runs the micro-batches of a step; a subclass applies their gradients. run, head: see causal_lm.split_at_head."""

    def __init__(self, placed: Placed, run: Run, head: nn.Module) -> None:
        self.model, self.run, self.head = placed.model, run, head
        self._processes, self._objective, self._mode = placed.processes, placed.objective, placed.mode
        self._prefix = FrozenPrefix(placed.model, memory=placed.memory, run=run)
        self._device = next(placed.model.parameters()).device

    def step(
        self, batches: Sequence[MicroBatch], scale: float, lr: float | None, max_norm: float | None, on_loss: OnLoss
    ) -> None:
        """See step.Runner."""
        assert lr is not None, f"{self._mode.name} has no rehearsal"
        with self._processes.together():
            self._objective.prepare(batches)
            for batch in batches:
                on_loss(batch, self._backward(batch, scale))
        with self._name_place("the optimiser step"):
            self._update(lr, max_norm)

    def recall(self, batches: Sequence[MicroBatch]) -> None:
        for batch in batches:
            ids, positions = inputs_of(batch, self.model, self._device)
            self._prefix.recall(ids, batch.rows, positions)
            if self._objective.remembers and self._objective.needs_reference(batch):
                self._objective.remember(self.head, self._base(batch), batch)

    @torch.no_grad()
    def hidden_states(self, batches: Sequence[MicroBatch]) -> Iterator[Tensor]:
        for batch in batches:
            ids, positions = inputs_of(batch, self.model, self._device)
            yield self.run(self.model, ids, positions)

    def _backward(self, batch: MicroBatch, scale: float) -> Tensor:
        """Run a micro-batch's forward and backward passes; return the sum of its losses."""
        with self._name_place(f"rows {batch.rows} of {batch.input_ids.shape[1]} tokens"):
            base = self._base(batch) if self._objective.needs_reference(batch) else None
            ids, positions = inputs_of(batch, self.model, self._device)
            hidden = self._prefix(ids, batch.rows, positions)
            return self._objective.backward(self.head, hidden, batch, scale, base)

    def _update(self, lr: float, max_norm: float | None) -> None:
        """Take the optimiser step. This process's gradients are complete; the other processes' are not added yet."""
        raise NotImplementedError

    @torch.no_grad()
    def _base(self, batch: MicroBatch) -> Tensor:
        """Return the input of the head (B, T, D) with every weight kept and without dropout."""
        ids, positions = inputs_of(batch, self.model, self._device)
        with evaluating(self.model), use_whole_weights(self.model):
            return self._prefix(ids, batch.rows, positions)

    def _name_place(self, place: str) -> AbstractContextManager:
        return naming_lack_of_memory(
            place,
            lambda: (
                f"all weights and activations are live on {self._device} under memory: {self._mode.name}. Set "
                "train.batch_size or data.sequence_length lower, or train.gradient_checkpointing; for masks set "
                "memory: layerwise; `mft estimate` tells what fits"
            ),
        )
