"""Losses that are sums over single tokens: one pass of the head over chunks, with each chunk backpropagated at once."""

import functools
import itertools
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from mft.data.batches import MicroBatch
from mft.models.token_loss import CHUNK
from mft.objectives.chunks import backward_chunk, chunks_of, few_rows, scored_states, scored_targets
from mft.objectives.objective import Objective

# (slice of the scored tokens, head's input (M, D), targets (M,), reference logits (M, V) or None)
Chunk = tuple[slice, Tensor, Tensor, Tensor | None]


class TokenObjective(Objective):
    """The sum over scored tokens of a function of one token's logits; autograd makes its gradient.

    A subclass defines name and token_losses; docs/how-to/objectives.md has an example that runs.
    """

    def token_losses(self, logits: Tensor, targets: Tensor, reference: Tensor | None) -> Tensor:
        """Return the losses (M,), differentiable in logits.

        Args:
            logits: (M, V) fp32, of a few tokens.
            targets: (M,), the next tokens.
            reference: (M, V) fp32, the logits to compare with, without gradients; None if there are none.
        """
        raise NotImplementedError

    def token_figures(self, logits: Tensor, targets: Tensor, reference: Tensor | None) -> dict[str, Tensor]:
        """Return the figures that evaluation reports, each (M,)."""
        return {"loss": self.token_losses(logits, targets, reference)}

    def reference_logits(self, head: nn.Module, reference: Tensor | None, batch: MicroBatch) -> Iterator[Tensor | None]:
        """Yield the reference logits for each chunk of scored tokens: the base's, by the same head; None without it."""
        if reference is None:
            yield from itertools.repeat(None)
        else:
            for _, chunk in chunks_of(scored_states(reference, batch)):
                yield head(chunk)

    def backward(
        self, head: nn.Module, hidden: Tensor, batch: MicroBatch, scale: float, reference: Tensor | None = None
    ) -> Tensor:
        states = scored_states(hidden, batch)
        total, grads = torch.zeros((), device=hidden.device), torch.empty_like(states)
        factors = torch.full((CHUNK,), scale, device=hidden.device)
        for part, chunk, targets, held_to in self._chunks(head, states.detach(), batch, reference):
            values_of = functools.partial(self._losses, targets, held_to)
            losses, grads[part] = backward_chunk(head, chunk, values_of, factors[: len(chunk)])
            total += losses.sum()
            del values_of, held_to  # free them before the next chunk's are made
        if len(states) and states.requires_grad:
            states.backward(grads)
        return total

    @torch.no_grad()
    def measure(
        self, head: nn.Module, hidden: Tensor, batch: MicroBatch, reference: Tensor | None = None
    ) -> dict[str, float]:
        sums: dict[str, float] = {}
        for _, chunk, targets, held_to in self._chunks(head, scored_states(hidden, batch), batch, reference):
            logits = head(chunk)
            for rows in few_rows(logits):
                figures = self.token_figures(logits[rows].float(), targets[rows], _some(held_to, rows))
                for name, values in figures.items():
                    sums[name] = sums.get(name, 0.0) + values.sum().item()
        return sums

    def _losses(self, targets: Tensor, held_to: Tensor | None, few: Tensor, rows: slice) -> Tensor:
        return self.token_losses(few, targets[rows], _some(held_to, rows))

    def _chunks(self, head: nn.Module, states: Tensor, batch: MicroBatch, reference: Tensor | None) -> Iterator[Chunk]:
        held_to, targets = self.reference_logits(head, reference, batch), scored_targets(batch, states.device)
        for part, chunk in chunks_of(states):
            with torch.no_grad():
                logits = next(held_to)
            yield part, chunk, targets[part], logits
            del logits
        next(held_to, None)  # run the generator to its end


def _some(logits: Tensor | None, rows: slice) -> Tensor | None:
    return None if logits is None else logits[rows].float()
