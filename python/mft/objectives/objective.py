"""What training makes smaller, as every way of running a step asks for it.

    way            hidden (B, T, D) of a micro-batch, and of the base if the objective asks for it
    objective      its loss, head and all, a chunk of logits at a time -> the gradient of hidden
    way            the decoder's backward pass

A loss of each token by itself is a TokenObjective, one of the tokens' log-probabilities a LogProbObjective; what is
neither derives from Objective and writes backward() itself.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from mft.data.batches import MicroBatch


class Objective:
    """A sum of losses over a micro-batch, which training divides by the step's count.

    All tensors lie on the device that computes. hidden (B, T, D) is what the head reads, reference the same of the
    base, with every weight kept: no second copy of the model, one more forward pass of its masked layers.
    """

    name = "objective"  # in the configuration, and of its figures
    of_base = False  # whether it may ask for the base's hidden states: then nothing but scores can be trained
    remembers = False  # whether remember() keeps what it needs of a reference

    def check_rows(self, dataset) -> None:
        """Raise ValueError unless these rows can be trained on, or evaluated."""

    def forget(self) -> None:
        """Called before training begins, on whatever rows: what remember() has kept is of others."""

    def count(self, batch: MicroBatch) -> int:
        """What the sum is divided by; the tokens that are scored."""
        return len(batch.labelled.targets)

    def prepare(self, batches: Sequence[MicroBatch]) -> None:
        """Called with a step's micro-batches, or those that are evaluated together, before any of them is run."""

    def needs_reference(self, batch: MicroBatch) -> bool:
        """Whether backward and measure have to be given the base's hidden states of this batch."""
        return self.of_base

    def remember(self, head: nn.Module, reference: Tensor, batch: MicroBatch) -> None:
        """Keep of training rows, by their numbers, what backward needs of a reference, and then asks for no more."""

    def backward(
        self, head: nn.Module, hidden: Tensor, batch: MicroBatch, scale: float, reference: Tensor | None = None
    ) -> Tensor:
        """Backpropagate scale * (sum of losses) into whatever requires grad; returns the plain sum, fp32, 0-d.

        The logits of a batch are not to exist together: head takes (M, D), and 128 tokens of a vocabulary of 128,000
        are 33 MB already in 16 bits. hidden.backward() is called once at most, at the end.
        """
        raise NotImplementedError

    def measure(
        self, head: nn.Module, hidden: Tensor, batch: MicroBatch, reference: Tensor | None = None
    ) -> dict[str, float]:
        """Sums of what evaluation is to say, "loss" among them; without gradients. They are divided by count."""
        raise NotImplementedError
