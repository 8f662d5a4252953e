"""Log-probabilities of sampled tokens, and divergences from a teacher, computed one chunk of logits at a time.

The backward pass computes the logits again. Only the answers' tokens are scored; TRL's own implementation scores every
position of prompt and answer if Triton is missing.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mft.objectives.chunks import chunks_of
from mft.objectives.kl import divergence


def token_log_probs(head: nn.Module, states: Tensor, tokens: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return (log p(token), entropy of p), fp32 (M,), for states (M, D); p = softmax(head(state) / temperature)."""
    return _map_chunks(states, lambda chunk, part: _chunk_log_probs(head, chunk, tokens[part], temperature))


def token_divergences(
    heads: tuple[nn.Module, nn.Module], states: tuple[Tensor, Tensor], kind: str, temperature: float
) -> tuple[Tensor, Tensor]:
    """Return (divergence of p from the teacher's q, entropy of p), fp32 (M,) each, over the whole vocabulary.

    heads, states: the model's and the teacher's; states (M, D) and (M, D'). kind: one of config.DIVERGENCES.
    """
    own, other = states
    return _map_chunks(own, lambda chunk, part: _chunk_divergences(heads, chunk, other[part], kind, temperature))


def _map_chunks(states: Tensor, values_of: Callable[[Tensor, slice], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Return two values (M,) for states (M, D). values_of computes those of a chunk, and again in the backward pass."""
    found = [
        checkpoint(values_of, chunk, part, use_reentrant=False, preserve_rng_state=False)
        for part, chunk in chunks_of(states)
    ]
    if not found:
        return states.sum(-1).float(), torch.zeros(0, device=states.device)
    first, second = zip(*found)
    return torch.cat(first), torch.cat(second)


def _chunk_log_probs(head: nn.Module, states: Tensor, tokens: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    log_p = (head(states).float() / temperature).log_softmax(-1)
    return log_p.gather(-1, tokens.unsqueeze(-1)).squeeze(-1), _entropy(log_p)


def _chunk_divergences(
    heads: tuple[nn.Module, nn.Module], states: Tensor, other: Tensor, kind: str, temperature: float
) -> tuple[Tensor, Tensor]:
    logits = heads[0](states).float() / temperature
    with torch.no_grad():
        wanted = heads[1](other).float() / temperature
    words = min(logits.shape[-1], wanted.shape[-1])  # the rest pads one vocabulary: no token has these ids
    log_p, log_q = logits[:, :words].log_softmax(-1), wanted[:, :words].log_softmax(-1)
    return _DIVERGENCES[kind](log_p, log_q), _entropy(log_p)


def _jensen_shannon(log_p: Tensor, log_q: Tensor) -> Tensor:
    middle = torch.logaddexp(log_p, log_q) - math.log(2)
    return (divergence(log_p, middle) + divergence(log_q, middle)) / 2


_DIVERGENCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "reverse_kl": divergence,
    "forward_kl": lambda log_p, log_q: divergence(log_q, log_p),
    "jsd": _jensen_shannon,
}


@torch.no_grad()
def _entropy(log_p: Tensor) -> Tensor:
    return -(log_p.exp() * log_p).sum(-1)
