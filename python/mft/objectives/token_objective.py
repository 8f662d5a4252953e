"""Losses of each scored token by itself: one pass of the head over chunks, each of which is backpropagated at once."""

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from mft.data.batches import MicroBatch
from mft.models.token_loss import CHUNK
from mft.objectives.objective import Objective

Chunk = tuple[Tensor, Tensor, Tensor | None]  # (M, D) that the head reads; targets (M,); (M, V) of what it is held to


class TokenObjective(Objective):
    """The sum over scored tokens of a function of one token's logits; autograd makes its gradient.

    class Focal(TokenObjective):
        name = "focal"

        def token_losses(self, logits, targets, reference):
            log_p = logits.log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)
            return -((1 - log_p.exp()) ** 2) * log_p
    """

    def token_losses(self, logits: Tensor, targets: Tensor, reference: Tensor | None) -> Tensor:
        """(M,), differentiable in logits.

        Args:
            logits: (M, V) fp32, of at most 128 tokens. targets: (M,), the tokens that come.
            reference: (M, V) fp32, what these logits are held to, if anything; without gradients.
        """
        raise NotImplementedError

    def token_figures(self, logits: Tensor, targets: Tensor, reference: Tensor | None) -> dict[str, Tensor]:
        """What evaluation is to say, each (M,)."""
        return {"loss": self.token_losses(logits, targets, reference)}

    def reference_logits(self, head: nn.Module, reference: Tensor | None, batch: MicroBatch) -> Iterator[Tensor | None]:
        """Those of a chunk of scored tokens after the other; the base's by the same head, None without a base."""
        if reference is None:
            yield from itertools.repeat(None)
        assert reference is not None
        for chunk in scored_states(reference, batch).split(CHUNK):
            yield head(chunk).float()

    def backward(
        self, head: nn.Module, hidden: Tensor, batch: MicroBatch, scale: float, reference: Tensor | None = None
    ) -> Tensor:
        states = scored_states(hidden, batch)
        total = torch.zeros((), device=hidden.device)
        grads = []
        for chunk, targets, held_to in self._chunks(head, states.detach(), batch, reference):
            leaf = chunk.requires_grad_()
            loss = self.token_losses(head(leaf).float(), targets, held_to).sum()
            total += loss.detach()
            (scale * loss).backward()
            assert leaf.grad is not None
            grads.append(leaf.grad)
            del loss, held_to  # the next chunk's logits take their place
        if grads and states.requires_grad:
            states.backward(torch.cat(grads))
        return total

    @torch.no_grad()
    def measure(
        self, head: nn.Module, hidden: Tensor, batch: MicroBatch, reference: Tensor | None = None
    ) -> dict[str, float]:
        sums: dict[str, float] = {}
        for chunk, targets, held_to in self._chunks(head, scored_states(hidden, batch), batch, reference):
            for name, values in self.token_figures(head(chunk).float(), targets, held_to).items():
                sums[name] = sums.get(name, 0.0) + values.sum().item()
        return sums

    def _chunks(self, head: nn.Module, states: Tensor, batch: MicroBatch, reference: Tensor | None) -> Iterator[Chunk]:
        held_to = self.reference_logits(head, reference, batch)
        for chunk, targets in zip(states.split(CHUNK), scored_targets(batch, states.device).split(CHUNK)):
            if not len(chunk):  # a split of nothing is one chunk of nothing
                break
            with torch.no_grad():
                logits = next(held_to)
            yield chunk, targets, logits
            del logits
        next(held_to, None)  # so that whoever makes them comes to its end


def scored_states(hidden: Tensor, batch: MicroBatch) -> Tensor:
    """(M, D): of hidden (B, T, D), the states from which a scored token is predicted."""
    return hidden.flatten(0, 1).index_select(0, batch.labelled.positions.to(hidden.device))


def scored_targets(batch: MicroBatch, device: torch.device) -> Tensor:
    """(M,): the tokens that are scored."""
    return batch.labelled.targets.to(device)
