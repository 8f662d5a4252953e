"""A teacher whose outputs are computed once per row, because a study's epochs and rates ask for them repeatedly."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from mft.data.batches import MicroBatch, take_rows
from mft.models.causal_lm import FEW, split_at_head
from mft.models.frozen_layers import PrefixMemory
from mft.models.longrope import by_own_length, inputs_of
from mft.models.packed_rows import keep_apart


class RememberedTeacher:
    """A Teacher (distillation.py): model in eval mode on the rows of dataset. What does not fit is computed again.

    The outputs are computed batch_size rows at once and in order, so that no run depends on which ran before it.
    """

    def __init__(self, model: nn.Module, dataset, *, batch_size: int) -> None:
        self._model, self._device = model, next(model.parameters()).device
        few = take_rows(dataset, [0]).input_ids[:1, :FEW].to(self._device)
        self._run, self.head = split_at_head(model, few)
        self._known = PrefixMemory()
        with keep_apart(model, dataset, few, batch_size):
            for start in range(0, len(dataset), batch_size):
                batch = take_rows(dataset, list(range(start, min(start + batch_size, len(dataset)))))
                for row, state in zip(batch.rows, self._run_model(batch)):
                    self._known.remember(row, state)

    def hidden_states(self, batches: Sequence[MicroBatch]) -> Iterator[Tensor]:
        """Yield the hidden states (B, T, D) of each batch in turn."""
        for batch in batches:
            known = [self._known.states.get(row) for row in batch.rows]
            found = [state for state in known if state is not None]
            yield torch.stack(found).to(self._device) if len(found) == len(known) else self._run_model(batch)

    @torch.no_grad()
    def _run_model(self, batch: MicroBatch) -> Tensor:
        with by_own_length(self._model):
            return self._run(self._model, *inputs_of(batch, self._model, self._device))
