"""Reader, Runner and States, the interfaces of the engines; StepReport; and the errors that end a step.

A step fails if a number is not finite or if memory runs out. The error then names the place.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mft.data.batches import MicroBatch

OnLoss = Callable[[MicroBatch, Tensor], None]  # may raise; no score has changed then


class Reader:
    """Runs a model without gradients."""

    model: nn.Module  # what runs: the model, or a copy of it
    head: nn.Module  # hidden states -> logits
    together = 16  # batches to ask for at once: they run through a layer while its weights are on the device

    def hidden_states(self, batches: Sequence[MicroBatch]) -> Iterator[Tensor]:
        """Yield the input of the head (B, T, D) for each batch, with what is learned so far, without gradients."""
        raise NotImplementedError

    def check_apart(self, dataset, sample: Tensor, batch_size: int) -> None:
        """Raise ValueError if what runs is a copy that cannot keep the examples of dataset's rows apart."""

    def close(self) -> None:
        """Give the model back, except for what finish() writes into it."""


class States:
    """What a runner trains: the tensors and their optimiser."""

    optimizer: torch.optim.Optimizer

    def check(self) -> None:
        """Raise if the last step made a score NaN or infinite and no later forward detects it. Call it every step."""

    def check_learned(self) -> None:
        """Raise NonFiniteLoss if a trained tensor is not finite and check() would not detect it. Call before a save."""

    def learned(self) -> Mapping[str, Tensor]:
        """Return the trained tensors by parameter name, where they are: scores, fp32 masters, or DTensors of rows."""
        raise NotImplementedError

    def result(self) -> Mapping[str, Tensor]:
        """Return what a finished run saves, in its present state and on its present device.

        Masks are LAYER.mask in pack_mask's format; weights go by parameter, in the model's dtype. Of processes in
        lockstep the first one gets it, the others nothing.
        """
        raise NotImplementedError

    def packed_masks(self) -> list[Tensor]:
        """Return the next step's masks in pack_mask's format, to be read; in lockstep, this process's rows."""
        raise NotImplementedError

    def refresh(self) -> None:
        """Update the model after a change of the trained tensors, so that it computes with them."""


class Runner(Reader):
    """Trains a model: the base class of Plain, InPlace, Resident, Layerwise and Sharded. Placed.start makes one."""

    states: States
    in_lockstep = False  # whether each process holds a part of the trained tensors; then all must make the same calls

    def step(
        self, batches: Sequence[MicroBatch], scale: float, lr: float | None, max_norm: float | None, on_loss: OnLoss
    ) -> None:
        """Take one optimiser step. on_loss gets each micro-batch's sum of losses before any trained tensor changes.

        Args: scale: the factor of the gradients; lr: None is a rehearsal in the modes that run layer by layer:
            gradients are computed, and nothing is updated.
        Raises: what on_loss raises; RuntimeError if memory runs out, which names the rows or the layer.
        """
        raise NotImplementedError

    def recall(self, batches: Sequence[MicroBatch]) -> None:
        """Cache the frozen layers' outputs for these rows, as step does; nothing is trained."""

    def finish(self) -> None:
        """Write what was learned into the model, after the last step. All processes must call it."""


@dataclass
class StepReport:
    """One optimiser step."""

    step: int  # counted from 1
    steps: int
    loss: float  # mean per unit that the objective counts: per token, or per pair
    lr: float
    tokens: int  # of this step
    seconds: float  # since the loop began, without evaluations
    dropped: float | None = None  # share of the masked weights; only for masks with a threshold, at logged steps


class NonFiniteLoss(RuntimeError):
    """The loss or a trained tensor became NaN or infinite."""


@contextlib.contextmanager
def naming_lack_of_memory(place: str, words: Callable[[], str]) -> Iterator[None]:
    """Turn torch's out-of-memory error, of a GPU or the host, into a RuntimeError with the place and ``words()``."""
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError is one
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        raise RuntimeError(f"out of memory at {place}; {words()} ({error})") from error
