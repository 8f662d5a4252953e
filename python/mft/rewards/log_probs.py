"""Log-probabilities of sampled tokens, a chunk of logits at a time; autograd makes the logits anew on the way back.

TRL's own scores every position of prompt and answer where Triton is not there; here the answers' tokens alone are.
"""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mft.objectives.chunks import chunks_of


def token_log_probs(head: nn.Module, states: Tensor, tokens: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """(log p(token), entropy of p), fp32 (M,) each, where p = softmax(head(state) / temperature).

    Args: states: (M, D), what the head reads; log p is differentiable in them and in the head. tokens: (M,).
    """
    found = [
        checkpoint(_of_chunk, head, chunk, tokens[part], temperature, use_reentrant=False, preserve_rng_state=False)
        for part, chunk in chunks_of(states)
    ]
    if not found:
        return states.sum(-1).float(), torch.zeros(0, device=states.device)
    log_probs, entropies = zip(*found)
    return torch.cat(log_probs), torch.cat(entropies)


def _of_chunk(head: nn.Module, states: Tensor, tokens: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    log_p = (head(states).float() / temperature).log_softmax(-1)
    with torch.no_grad():
        entropy = -(log_p.exp() * log_p).sum(-1)
    return log_p.gather(-1, tokens.unsqueeze(-1)).squeeze(-1), entropy
