"""Run several answers to one question with a single pass over the question, in the backward pass too.

If a batch has fewer than two answers per question on average, its rows run in full: keeping the prompts' keys and
values a second time for the answers would cost more than it saves. Batches with rows beyond the switch of longrope.py
also run in full, because a prompt's keys then depend on the answer's length.
"""

from typing import Any

import torch
from torch import Tensor

from mft.models.causal_lm import decoder_of, run_decoder
from mft.models.key_value_cache import extend_cache
from mft.models.longrope import switch_length
from mft.models.packed_rows import positions_of


def states_before_answers(model: Any, ids: Tensor, seen: Tensor, length: int) -> Tensor:
    """Return the hidden states (B, length, D) that predict the last ``length`` tokens of each row; differentiable.

    Args: model: see key_value_cache.can_extend_cache; ids: (B, T), prompts padded on the left, then answers padded on
        the right; seen: (B, T), 0 on padding.
    """
    prompt = ids.shape[1] - length
    both = torch.cat([ids[:, :prompt], seen[:, :prompt]], 1)
    distinct, rows = both.unique(dim=0, return_inverse=True)
    switch = switch_length(model)
    if 2 * len(distinct) > len(ids) or (switch is not None and ids.shape[1] > switch):
        return run_decoder(model, ids, positions_of(decoder_of(model), seen), seen)[:, prompt - 1 : -1]
    read, cache = extend_cache(model, distinct[:, :prompt], distinct[:, prompt:])
    states = read[rows, -1:]
    if length == 1:
        return states
    cache.batch_select_indices(rows)
    said, _ = extend_cache(model, ids[:, prompt:-1], seen[:, :-1], cache)
    return torch.cat([states, said], 1)
