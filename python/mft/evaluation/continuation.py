"""Prompts continued by a model's own generate, in eval mode and by given settings alone."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import GenerationConfig

from mft.models.head_input import read_in_one_piece
from mft.models.key_value_cache import read_on, reads_on
from mft.models.longrope import switch_length


def continue_prompts(prompts: Sequence[list[int]], model: Any, pad: int) -> list[list[int]]:
    """What model.generate appends to each, padded on the left so that all end where generation begins.

    generate counts positions from the attention mask, so the padding shifts nobody's. After its eos a continuation is
    padding up to the longest. A prompt that is given several times is read once where key_value_cache.reads_on
    says so. Where frequencies depend on the longest row (longrope.py) and one may pass the switch, each is continued
    by itself.
    """
    longest, switch = max(map(len, prompts)), switch_length(model)
    if len(prompts) > 1 and switch is not None and longest + model.generation_config.max_new_tokens > switch:
        found = [continue_prompts([prompt], model, pad)[0] for prompt in prompts]
        most = max(map(len, found))
        return [tokens + [pad] * (most - len(tokens)) for tokens in found]
    device = next(model.parameters()).device
    distinct = list(dict.fromkeys(map(tuple, prompts)))
    ids = torch.tensor([[pad] * (longest - len(prompt)) + [*prompt] for prompt in distinct], device=device)
    seen = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in distinct], device=device)
    rows = torch.tensor([distinct.index(tuple(prompt)) for prompt in prompts], device=device)
    read = {}
    if len(distinct) < len(prompts) and longest > 1 and reads_on(model):
        _, cache = read_on(model, ids[:, :-1], seen[:, :-1])
        cache.batch_select_indices(rows)
        read["cache"] = cache
    return model.generate(ids[rows], attention_mask=seen[rows], **read)[:, longest:].tolist()


@contextlib.contextmanager
def generating(model: Any, settings: GenerationConfig) -> Iterator[None]:
    """In eval mode, without the model's own generation settings: generate would fill ours up with its penalties."""
    was_training, own, hook = model.training, model.generation_config, read_in_one_piece(model)
    model.eval()
    model.generation_config = settings
    try:
        yield
    finally:
        if hook is not None:
            hook.remove()
        model.generation_config = own
        model.train(was_training)


def text_before(eos: int, tokens: Sequence[int], tokenizer: Any) -> str:
    """What stands before eos, without white space at its ends."""
    end = tokens.index(eos) if eos in tokens else len(tokens)
    return tokenizer.decode(tokens[:end], clean_up_tokenization_spaces=False).strip()
