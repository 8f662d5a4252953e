"""Several answers to one question, of which the question is read once, on the way back too.

Where a batch has fewer than two answers a question it is read as it is: the answers' layers then keep the keys and
values of the prompts once more, which is more than what is not read twice. So is one with rows beyond the switch of
longrope.py, where a prompt's keys depend on the answer's length.
"""

from typing import Any

import torch
from torch import Tensor

from mft.models.causal_lm import decoder_of, run_decoder
from mft.models.key_value_cache import read_on
from mft.models.longrope import switch_length
from mft.models.packed_rows import positions_of


def states_before_answers(model: Any, ids: Tensor, seen: Tensor, length: int) -> Tensor:
    """Hidden states (B, length, D) from which the last ``length`` tokens of each row are predicted; differentiable.

    Args:
        model: one of which key_value_cache.reads_on says yes.
        ids: (B, T), prompts padded on the left and then answers padded on the right.
        seen: (B, T), 0 on padding.
    """
    prompt = ids.shape[1] - length
    both = torch.cat([ids[:, :prompt], seen[:, :prompt]], 1)
    distinct, rows = both.unique(dim=0, return_inverse=True)
    switch = switch_length(model)
    if 2 * len(distinct) > len(ids) or (switch is not None and ids.shape[1] > switch):
        return run_decoder(model, ids, positions_of(decoder_of(model), seen), seen)[:, prompt - 1 : -1]
    read, cache = read_on(model, distinct[:, :prompt], distinct[:, prompt:])
    states = read[rows, -1:]
    if length == 1:
        return states
    cache.batch_select_indices(rows)
    said, _ = read_on(model, ids[:, prompt:-1], seen[:, :-1], cache)
    return torch.cat([states, said], 1)
