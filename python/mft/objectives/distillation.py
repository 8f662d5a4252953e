"""Distillation: the model learns from a teacher's probabilities and from the data (Hinton et al., arXiv 1503.02531)."""

from collections.abc import Iterator, Sequence
from typing import Protocol

from torch import Tensor, nn

from mft.checks import check_rule
from mft.data.batches import MicroBatch
from mft.objectives.chunks import chunks_of, scored_states
from mft.objectives.kl import cross_entropy, divergence
from mft.objectives.token_objective import TokenObjective


class Teacher(Protocol):
    """Another model with the same vocabulary; see training/model_teacher.py."""

    head: nn.Module

    def hidden_states(self, batches: Sequence[MicroBatch]) -> Iterator[Tensor]:
        """Yield the input of its head (B, T, D') for each batch; the head stays there until the next one."""


class Distillation(TokenObjective):
    """For each scored token: weight * -log p(token) + (1 - weight) * T^2 * KL(teacher's p at T || p at T).

    temperature: T, positive; the factor T^2 keeps the gradient's size independent of it. weight: in [0, 1].
    """

    name = "distill"

    def __init__(self, teacher: Teacher, temperature: float = 1.0, weight: float = 0.5) -> None:
        check_rule(temperature > 0, "temperature", "be positive", temperature)
        check_rule(0 <= weight <= 1, "weight", "lie in [0, 1]", weight)
        self.teacher, self.temperature, self.weight = teacher, temperature, weight
        self._states: Iterator[tuple[MicroBatch, Tensor]] = iter(())  # of the batches to come
        self._left = 0

    def prepare(self, batches: Sequence[MicroBatch]) -> None:
        self._states = zip(batches, self.teacher.hidden_states(batches))
        self._left = len(batches)

    def reference_logits(self, head: nn.Module, reference: Tensor | None, batch: MicroBatch) -> Iterator[Tensor | None]:
        known, hidden = next(self._states)
        assert known is batch, "batches come in the order in which they were prepared"
        for _, chunk in chunks_of(scored_states(hidden, batch)):
            yield self.teacher.head(chunk)
        self._left -= 1
        if not self._left:  # finish the teacher's iterator, so that its weights can leave the device
            next(self._states, None)

    def token_losses(self, logits: Tensor, targets: Tensor, reference: Tensor | None) -> Tensor:
        return self.token_figures(logits, targets, reference)["loss"]

    def token_figures(self, logits: Tensor, targets: Tensor, reference: Tensor | None) -> dict[str, Tensor]:
        assert reference is not None, "the teacher has been asked"
        words = min(logits.shape[-1], reference.shape[-1])  # the rest pads one vocabulary: no token has these ids
        wanted = (reference[:, :words] / self.temperature).log_softmax(-1)
        kl = self.temperature**2 * divergence(wanted, (logits[:, :words] / self.temperature).log_softmax(-1))
        loss = (1 - self.weight) * kl
        if self.weight:
            loss = loss + self.weight * cross_entropy(logits.log_softmax(-1), targets)
        return {"loss": loss, "kl": kl}
