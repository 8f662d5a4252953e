"""Log-probabilities of tokens: those of the model itself, before a request's options change its logits."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_LEAST = -9999.0  # as with vLLM: JSON has no infinity
_AT_ONCE = 256  # rows that are computed in fp32 at once: 48 MiB with SmolLM2


@dataclass(frozen=True)
class TokenLogprob:
    """A token and its log-probability, None for the first of a prompt. top: the likeliest tokens, with theirs."""

    token: int
    logprob: float | None = None
    top: Sequence[tuple[int, float]] = ()


def token_logprobs(logits: Tensor, tokens: Sequence[int], top: int) -> list[TokenLogprob]:
    """Return what logits (n or more, V) say about n tokens. top: the number of likeliest tokens to name."""
    found = []
    for begin in range(0, len(tokens), _AT_ONCE):
        these = tokens[begin : begin + _AT_ONCE]
        some = logits[begin : begin + len(these)].float()
        total = some.logsumexp(-1, keepdim=True)
        given = torch.tensor(these, device=some.device)[:, None]
        values, ids = some.topk(min(top, some.shape[-1]), -1)
        own, likeliest = ((each - total).clamp(min=_LEAST).tolist() for each in (some.gather(-1, given), values))
        for token, (logprob,), *pairs in zip(these, own, ids.tolist(), likeliest, strict=True):
            found.append(TokenLogprob(token, logprob, [*zip(*pairs, strict=True)]))
    return found
