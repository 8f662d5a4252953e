"""The teacher of a distillation: another model with the same vocabulary, which runs without gradients."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mft.data.batches import MicroBatch
from mft.engines.mode import Device, device_named, place
from mft.engines.step import Reader
from mft.models.causal_lm import FEW
from mft.models.longrope import by_own_length
from mft.models.packed_rows import check_kept_apart


class ModelTeacher:
    """A causal language model, set to eval mode and frozen, that provides hidden states and a head for distillation.

    Args: way: "plain", or "layerwise": one layer's weights at a time are on device; device: None for the first GPU, or
        the CPU.
    Raises: ValueError, when the first rows come, if packed rows are not kept apart, or if the model does not support
        way.
    """

    head: nn.Module

    def __init__(self, model: Any, way: str = "plain", device: Device = None) -> None:
        self.model = model.requires_grad_(False).eval()
        self._placed = dataclasses.replace(place(model, way=way), device=device_named(device))
        self._placed.mode.move(model, self._placed.device)
        self._apart = False  # whether packed rows have been tried
        self._reader: Reader | None = None

    @torch.no_grad()
    def hidden_states(self, batches: Sequence[MicroBatch]) -> Iterator[Tensor]:
        """Yield the input of the head (B, T, D) for each batch; the head stays on the device until the next one."""
        if self._reader is None:
            self._reader = self._placed.read(self._sample(batches[0]))
            self.head = self._reader.head
        with by_own_length(self.model):
            if not self._apart and any(batch.position_ids is not None for batch in batches):
                batch = batches[0]
                check_kept_apart(self.model, self._sample(batch), len(batch.rows), batch.input_ids.shape[1])
                self._apart = True
            yield from self._reader.hidden_states(batches)

    def _sample(self, batch: MicroBatch) -> Tensor:
        return batch.input_ids[:1, :FEW].to(next(self.model.parameters()).device)
