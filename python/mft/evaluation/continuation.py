"""Continue prompts with a model's own generate, in eval mode and only with the given settings."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import GenerationConfig

from mft.models.head_input import read_in_one_piece
from mft.models.key_value_cache import read_on, reads_on
from mft.models.longrope import switch_length


def continue_prompts(prompts: Sequence[list[int]], model: Any, pad: int) -> list[list[int]]:
    """Return the tokens that model.generate appends to each prompt.

    Prompts are padded on the left, so that all end where generation begins. generate counts positions from the
    attention mask, so padding does not shift positions. After its eos a continuation is padded up to the longest one.

    A prompt that occurs several times is read only once if key_value_cache.reads_on allows it. If frequencies depend on
    the longest row (longrope.py) and a row may pass the switch, each prompt is continued separately.
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
    """Enter eval mode with only these generation settings; generate would add the model's own, such as penalties."""
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
    """Return the text before eos, without white space at its ends."""
    end = tokens.index(eos) if eos in tokens else len(tokens)
    return tokenizer.decode(tokens[:end], clean_up_tokenization_spaces=False).strip()
