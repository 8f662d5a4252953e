"""Losses of all scored tokens' log-probabilities together, for example of whole answers, in one pass of the head.

The gradient of a token's hidden state is linear in the factor of that token's log-probability. So chunks are
backpropagated with the factor 1 while the factors are unknown. Each token's gradient is multiplied by its factor once
all log-probabilities are known. The gradient of a trained head is a sum over tokens, so such a head runs twice.
"""

import functools

import torch
from torch import Tensor, nn

from mft.data.batches import MicroBatch
from mft.objectives.chunks import backward_chunk, chunks_of, few_rows, scored_states, scored_targets
from mft.objectives.objective import Objective


class LogProbObjective(Objective):
    """A function of all scored tokens' log-probabilities in a micro-batch; autograd makes its gradient.

    A subclass defines name and loss; docs/how-to/objectives.md has an example that runs.
    """

    def loss(self, log_probs: Tensor, batch: MicroBatch, reference: Tensor | None) -> Tensor:
        """Return the sum of losses, 0-d, differentiable in log_probs; these and reference, the base's, are (M,)."""
        raise NotImplementedError

    def figures(self, log_probs: Tensor, batch: MicroBatch, reference: Tensor | None) -> dict[str, Tensor]:
        """Return the figures that evaluation reports: sums, 0-d."""
        return {"loss": self.loss(log_probs, batch, reference)}

    def backward(
        self, head: nn.Module, hidden: Tensor, batch: MicroBatch, scale: float, reference: Tensor | None = None
    ) -> Tensor:
        base = None if reference is None else log_probs_of(head, reference, batch)
        states, targets = scored_states(hidden, batch), scored_targets(batch, hidden.device)
        if any(p.requires_grad for p in head.parameters()):
            total, factors = self._factors(log_probs_of(head, hidden, batch), batch, base)
            _, grads = _log_probs_and_gradients(head, states, targets, factors * scale)
        else:
            log_probs, grads = _log_probs_and_gradients(head, states, targets, None)
            total, factors = self._factors(log_probs, batch, base)
            grads = (grads * (factors * scale).unsqueeze(-1)).to(states.dtype)
        if len(targets) and states.requires_grad:
            states.backward(grads)
        return total

    @torch.no_grad()
    def measure(
        self, head: nn.Module, hidden: Tensor, batch: MicroBatch, reference: Tensor | None = None
    ) -> dict[str, float]:
        base = None if reference is None else log_probs_of(head, reference, batch)
        found = self.figures(log_probs_of(head, hidden, batch), batch, base)
        return {name: value.item() for name, value in found.items()}

    def _factors(self, log_probs: Tensor, batch: MicroBatch, base: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the loss and its derivative with respect to each log-probability (M,)."""
        with torch.enable_grad():
            leaf = log_probs.detach().requires_grad_()
            total = self.loss(leaf, batch, base)
            if not total.requires_grad:  # no token is scored
                return total.detach(), torch.zeros_like(leaf)
            (factors,) = torch.autograd.grad(total, leaf)
        return total.detach(), factors


@torch.no_grad()
def log_probs_of(head: nn.Module, hidden: Tensor, batch: MicroBatch) -> Tensor:
    """Return log p of each scored token, (M,) fp32, computed one chunk of logits at a time."""
    targets = scored_targets(batch, hidden.device)
    found = torch.empty(len(targets), device=hidden.device)
    for part, chunk in chunks_of(scored_states(hidden, batch)):
        logits = head(chunk)
        for rows in few_rows(logits):
            found[part][rows] = _log_p(targets[part], logits[rows].float(), rows)
    return found


def _log_probs_and_gradients(
    head: nn.Module, states: Tensor, targets: Tensor, factors: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return log p (M,), and the gradient (M, D) of sum(factors * log p); without factors they are 1."""
    factors = torch.ones(len(targets), device=states.device) if factors is None else factors
    log_probs, grads = torch.empty(len(targets), device=states.device), torch.empty_like(states)
    for part, chunk in chunks_of(states):
        values_of = functools.partial(_log_p, targets[part])
        log_probs[part], grads[part] = backward_chunk(head, chunk, values_of, factors[part])
    return log_probs, grads


def _log_p(targets: Tensor, logits: Tensor, rows: slice) -> Tensor:
    """Return the log-probabilities of targets[rows], which these logits predict."""
    return logits.gather(-1, targets[rows].unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)
