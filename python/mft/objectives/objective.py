"""Objective, the interface between a loss and the engines, which run a step in a memory mode ("way").

    engine         hidden (B, T, D) of a micro-batch, and of the base if the objective needs it
    objective      head and loss, one chunk of logits at a time -> the gradient of hidden
    engine         the decoder's backward pass

A loss that is a sum over single tokens is a TokenObjective; one of the tokens' log-probabilities is a LogProbObjective.
Any other loss derives from Objective and implements backward() itself.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from mft.data.batches import MicroBatch


class Objective:
    """A sum of losses over a micro-batch, which training divides by the step's count.

    All tensors are on the device that computes. hidden (B, T, D) is the input of the head. reference is the same for
    the base, which keeps every weight: it needs no second copy of the model, but one more forward pass of its masked
    layers.
    """

    name = "objective"  # in the configuration, and in the names of its figures
    of_base = False  # whether it may need the base's hidden states; then only scores can be trained
    remembers = False  # whether remember() stores what it needs from a reference

    def check_rows(self, dataset) -> None:
        """Raise ValueError if these rows cannot be trained on or evaluated."""

    def forget(self) -> None:
        """Drop what remember() has stored, which belongs to other rows. Called before training begins."""

    def count(self, batch: MicroBatch) -> int:
        """Return the divisor of the sum: by default the number of scored tokens."""
        return len(batch.labelled.targets)

    def prepare(self, batches: Sequence[MicroBatch]) -> None:
        """Prepare for a step's micro-batches, or those that are evaluated together. Called before any of them runs."""

    def needs_reference(self, batch: MicroBatch) -> bool:
        """Whether backward and measure need the base's hidden states of this batch."""
        return self.of_base

    def remember(self, head: nn.Module, reference: Tensor, batch: MicroBatch) -> None:
        """Store what backward needs from a reference, by row number, so that these rows need no reference again."""

    def backward(
        self, head: nn.Module, hidden: Tensor, batch: MicroBatch, scale: float, reference: Tensor | None = None
    ) -> Tensor:
        """Backpropagate scale * (sum of losses) into all that requires grad; return the unscaled sum, fp32, 0-d.

        The logits of a whole batch must not exist at once: in 16 bits, 128 tokens with a vocabulary of 128,000 already
        take 33 MB. head takes (M, D). Call hidden.backward() at most once, at the end.
        """
        raise NotImplementedError

    def measure(
        self, head: nn.Module, hidden: Tensor, batch: MicroBatch, reference: Tensor | None = None
    ) -> dict[str, float]:
        """Return the sums that evaluation reports after division by count, with "loss" among them. No gradients."""
        raise NotImplementedError
