"""A step by autograd over the model's own forward: the base class of memory modes plain, in_place and sharded."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from mft.data.batches import MicroBatch
from mft.engines.distributed import ALONE, Processes
from mft.engines.step import OnLoss, naming_lack_of_memory
from mft.masks.base_pass import as_base
from mft.models.causal_lm import Run, evaluating
from mft.models.frozen_layers import FrozenPrefix, PrefixMemory
from mft.models.longrope import inputs_of
from mft.objectives.cross_entropy import CROSS_ENTROPY
from mft.objectives.objective import Objective


class OwnForward:
    """Runs the micro-batches of a step; a subclass applies their gradients.

    Args:
        run, head: See causal_lm.split_at_head.
        memory: A cache of the frozen layers' outputs, or None.
        processes: The processes whose gradients are summed for a step.
        objective: The objective to minimise.
    """

    way = ""  # the memory mode's name in the configuration

    def __init__(
        self,
        model: nn.Module,
        run: Run,
        head: nn.Module,
        memory: PrefixMemory | None,
        processes: Processes = ALONE,
        objective: Objective = CROSS_ENTROPY,
    ) -> None:
        self._model, self._processes, self._run = model, processes, run
        self.head, self._objective = head, objective
        self._prefix = FrozenPrefix(model, memory=memory, run=run)
        self._device = next(model.parameters()).device

    def step(
        self, batches: Sequence[MicroBatch], scale: float, lr: float | None, max_norm: float | None, on_loss: OnLoss
    ) -> None:
        """See step.Runner."""
        assert lr is not None, f"{self.way} has no rehearsal"
        with self._processes.together():
            self._objective.prepare(batches)
            for batch in batches:
                on_loss(batch, self._backward(batch, scale))
        with self._at("the optimiser step"):
            self._update(lr, max_norm)

    def recall(self, batches: Sequence[MicroBatch]) -> None:
        """Cache the frozen layers' outputs for these rows, as step does; nothing is trained."""
        for batch in batches:
            ids, positions = inputs_of(batch, self._model, self._device)
            self._prefix.recall(ids, batch.rows, positions)
            if self._objective.remembers and self._objective.needs_reference(batch):
                self._objective.remember(self.head, self._base(batch), batch)

    @torch.no_grad()
    def hidden_states(self, batches: Sequence[MicroBatch]) -> Iterator[Tensor]:
        """Yield the input of the head (B, T, D) for each batch, with what is learned so far, without gradients."""
        for batch in batches:
            ids, positions = inputs_of(batch, self._model, self._device)
            yield self._run(self._model, ids, positions)

    def _backward(self, batch: MicroBatch, scale: float) -> Tensor:
        """Run a micro-batch's forward and backward passes; return the sum of its losses."""
        with self._at(f"rows {batch.rows} of {batch.input_ids.shape[1]} tokens"):
            base = self._base(batch) if self._objective.needs_reference(batch) else None
            ids, positions = inputs_of(batch, self._model, self._device)
            hidden = self._prefix(ids, batch.rows, positions)
            return self._objective.backward(self.head, hidden, batch, scale, base)

    def _update(self, lr: float, max_norm: float | None) -> None:
        """Take the optimiser step. This process's gradients are complete; the other processes' are not added yet."""
        raise NotImplementedError

    @torch.no_grad()
    def _base(self, batch: MicroBatch) -> Tensor:
        """Return the input of the head (B, T, D) with every weight kept and without dropout."""
        ids, positions = inputs_of(batch, self._model, self._device)
        with evaluating(self._model), as_base(self._model):
            return self._prefix(ids, batch.rows, positions)

    def _at(self, place: str) -> AbstractContextManager:
        return naming_lack_of_memory(
            place,
            lambda: (
                f"all weights and activations are live on {self._device} under memory: {self.way}. Set "
                "train.batch_size or data.sequence_length lower, or train.gradient_checkpointing; for masks set "
                "memory: layerwise; `mft estimate` tells what fits"
            ),
        )
