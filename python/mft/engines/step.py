"""What takes optimiser steps, whichever way; what it tells of one, and what ends one.

A step that ends early has numbers that are not finite, or lacks memory, and is told by where it was.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from mft.data.batches import MicroBatch

OnLoss = Callable[[MicroBatch, Tensor], None]  # may raise, before any score has changed


class Runner(Protocol):
    """Plain, InPlace, Resident, Layerwise or Sharded on one model, as start.start_runner makes it."""

    # Whether each process holds a part of what is learned, so that all must call each method, and as often.
    in_lockstep: bool

    def step(
        self, batches: Sequence[MicroBatch], scale: float, lr: float | None, max_norm: float | None, on_loss: OnLoss
    ) -> None:
        """One optimiser step; on_loss hears each micro-batch's sum of losses before anything learned changes.

        Args: scale: of the gradients. lr: None, of ways that run layer by layer, is a rehearsal: gradients are made,
            and nothing is updated.
        Raises: whatever on_loss raises; RuntimeError for a lack of memory, naming rows or layer.
        """

    def check(self) -> None:
        """After each step: raise if it has made a score NaN or infinite, where no later forward finds it."""

    def check_learned(self) -> None:
        """Before anything learned is saved: raise NonFiniteLoss if it is not finite, where check() does not find it."""

    def recall(self, batches: Sequence[MicroBatch]) -> None:
        """Remember what the frozen layers make of these rows, as step would; nothing is trained."""

    @property
    def optimizer(self) -> torch.optim.Optimizer: ...

    def learned(self) -> Mapping[str, Tensor]:
        """What is trained, as it rests, by the parameter's name: scores, or fp32 masters of 16-bit weights.

        DTensors where each process holds some rows.
        """

    head: nn.Module  # hidden states -> logits

    def hidden_states(self, batches: Sequence[MicroBatch]) -> Iterator[Tensor]:
        """What the head reads (B, T, D) for each batch, by what is learned so far, without gradients."""

    def result(self) -> Mapping[str, Tensor]:
        """What a finished run saves, as it is now and where it lies: each mask as bits, LAYER.mask, int32 as of
        pack_mask; trained weights by the parameter's name, in the model's dtype."""

    def packed_masks(self) -> list[Tensor]:
        """The bits that the next step computes with, a layer each, as of pack_mask; its own, and ready to be read."""

    def relearned(self) -> None:
        """After a change of what is learned: the model computes with it."""

    def finish(self) -> None:
        """After the last step: the model has what was learned. All processes call it."""

    def close(self) -> None:
        """The model is whole again, but for what finish() gives back."""


@dataclass
class StepReport:
    """One optimiser step."""

    step: int  # from 1
    steps: int
    loss: float  # mean over what the objective counts: a token, or a pair
    lr: float
    tokens: int  # of this step
    seconds: float  # since the loop began, but for evaluations
    dropped: float | None = None  # share of the masked weights; of masks with a threshold, at steps that are logged


class NonFiniteLoss(RuntimeError):
    """The loss, or what was learned from it, became NaN or infinite."""


@contextlib.contextmanager
def naming_lack_of_memory(place: str, words: Callable[[], str]) -> Iterator[None]:
    """Turn torch's lack of memory, on a GPU or the host, into a RuntimeError that says where, and ``words()``."""
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError is one
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        raise RuntimeError(f"out of memory at {place}; {words()} ({error})") from error
