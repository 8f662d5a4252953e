"""The head a chunk of tokens at a time, and in it a function of logits with its gradient, a few rows at a time.

Of a chunk there are logits and their gradient in the head's dtype; what a function makes of them in fp32 exists for few
rows, on a CPU for as many as its cache holds.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from mft.data.batches import MicroBatch
from mft.models.token_loss import CHUNK, rows_at_once

ROWS = 32  # of a GPU: 128,000 words of 32 tokens are 16 MB in fp32, and ten such tensors a fair share of a chunk's


def scored_states(hidden: Tensor, batch: MicroBatch) -> Tensor:
    """(M, D): of hidden (B, T, D), the states from which a scored token is predicted."""
    return hidden.flatten(0, 1).index_select(0, batch.labelled.positions.to(hidden.device))


def scored_targets(batch: MicroBatch, device: torch.device) -> Tensor:
    """(M,): the tokens that are scored."""
    return batch.labelled.targets.to(device)


def chunks_of(states: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """(places among all, (128, D) or fewer) of states (M, D); none of no state."""
    for start in range(0, len(states), CHUNK):
        part = slice(start, start + CHUNK)
        yield part, states[part]


def few_rows(logits: Tensor) -> Iterator[slice]:
    """The rows of logits (M, V), so many at a time that what is made of them in fp32 is small."""
    rows = min(ROWS, rows_at_once(logits))
    return (slice(start, start + rows) for start in range(0, len(logits), rows))


def backward_chunk(
    head: nn.Module, states: Tensor, values_of: Callable[[Tensor, slice], Tensor], factors: Tensor
) -> tuple[Tensor, Tensor]:
    """Values (M,) of states (M, D), and the gradient (M, D) of the sum of factors * values, a learning head's as well.

    Args:
        values_of: (fp32 logits (m, V), their rows in M) -> (m,), differentiable in these logits.
        factors: (M,).
    """
    leaf = states.detach().requires_grad_()
    logits = head(leaf)
    values, d_logits = torch.empty(len(states), device=states.device), torch.empty_like(logits)
    for rows in few_rows(logits):
        few = logits[rows].detach().float().requires_grad_()
        value = values_of(few, rows)
        value.backward(factors[rows])
        values[rows], d_logits[rows] = value.detach(), few.grad
        del few, value
    logits.backward(d_logits)
    assert leaf.grad is not None
    return values, leaf.grad
