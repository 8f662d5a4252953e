"""Run the head on one chunk of tokens at a time, and a function of its logits, with gradient, on a few rows at a time.

A chunk has its logits and their gradient in the head's dtype. The function's fp32 tensors exist only for a few rows: on
a CPU for as many as fit in its cache.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from mft.data.batches import MicroBatch
from mft.models.token_loss import CHUNK, rows_at_once

ROWS = 32  # on a GPU: with 128,000 words, 32 rows of fp32 logits are 16 MB; ten such tensors are small for a chunk


def scored_states(hidden: Tensor, batch: MicroBatch) -> Tensor:
    """Return the states (M, D) of hidden (B, T, D) that predict a scored token."""
    return hidden.flatten(0, 1).index_select(0, batch.labelled.positions.to(hidden.device))


def scored_targets(batch: MicroBatch, device: torch.device) -> Tensor:
    """Return the scored tokens (M,)."""
    return batch.labelled.targets.to(device)


def chunks_of(states: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield (slice of rows, chunk of at most (128, D)) for states (M, D); nothing if M is 0."""
    for start in range(0, len(states), CHUNK):
        part = slice(start, start + CHUNK)
        yield part, states[part]


def few_rows(logits: Tensor) -> Iterator[slice]:
    """Yield slices of the rows of logits (M, V), with so few rows each that fp32 tensors of them are small."""
    rows = min(ROWS, rows_at_once(logits))
    return (slice(start, start + rows) for start in range(0, len(logits), rows))


def backward_chunk(
    head: nn.Module, states: Tensor, values_of: Callable[[Tensor, slice], Tensor], factors: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the values (M,) for states (M, D), and the gradient (M, D) of sum(factors * values).

    values_of: (fp32 logits (m, V), their rows in M) -> (m,), differentiable. A trained head's gradient is accumulated.
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
