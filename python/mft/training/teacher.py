"""The teacher of a distillation: another model with the same vocabulary, which runs without gradients."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mft.data.batches import MicroBatch
from mft.engines.layer_engine import LayerEngine
from mft.engines.start import Device, default_device, start_engine
from mft.models.causal_lm import FEW, Run, split_at_head
from mft.models.longrope import by_own_length, inputs_of
from mft.models.packed_rows import check_kept_apart


class ModelTeacher:
    """A causal language model that provides hidden states and a head for distillation.

    Args:
        model: The model. It is set to eval mode and frozen.
        way: "plain": the whole model is on device. "layerwise": one layer's weights at a time are on device, and each
            layer runs all micro-batches of a step.
        device: None: the first GPU, or the CPU.
    Raises: ValueError, when the first rows come, if examples of packed rows see each other in this model, or if the
        model does not support way.
    """

    head: nn.Module

    def __init__(self, model: Any, way: str = "plain", device: Device = None) -> None:
        self._device = default_device() if device is None else torch.device(device)
        self.model = model.requires_grad_(False).eval()
        if way == "plain":
            self.model.to(self._device)
        self._way = way
        self._apart = False  # whether packed rows have been tried
        self._run: Run | None = None
        self._engine: LayerEngine | None = None

    @torch.no_grad()
    def hidden_states(self, batches: Sequence[MicroBatch]) -> Iterator[Tensor]:
        """Yield the input of the head (B, T, D) for each batch.

        The head stays on the same device until the next batch is asked for.
        """
        if self._run is None and self._engine is None:
            self._begin(batches[0])
        with by_own_length(self.model):
            if not self._apart and any(batch.position_ids is not None for batch in batches):
                batch = batches[0]
                check_kept_apart(self.model, self._few(batch), len(batch.rows), batch.input_ids.shape[1])
                self._apart = True
            if self._engine is not None:
                yield from self._engine.hidden_states(batches)
                return
            assert self._run is not None
            for batch in batches:
                yield self._run(self.model, *inputs_of(batch, self.model, self._device))

    def _begin(self, batch: MicroBatch) -> None:
        few = self._few(batch)
        if self._way == "plain":
            self._run, self.head = split_at_head(self.model, few)
        else:
            self._engine = start_engine(self.model, few, self._way, self._device)
            self.head = self._engine.head

    def _few(self, batch: MicroBatch) -> Tensor:
        return batch.input_ids[:1, :FEW].to(next(self.model.parameters()).device)
