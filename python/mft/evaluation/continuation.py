"""Continue prompts with a model's own generate, in eval mode and only with the given settings."""

import contextlib
import itertools
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from transformers import GenerationConfig

from mft.models.head_input import read_in_one_piece
from mft.models.key_value_cache import can_extend_cache, extend_cache
from mft.models.longrope import switch_length

_TOKENS_TOGETHER = 4096


def continue_prompts(prompts: Sequence[list[int]], model: Any, pad: int) -> list[list[int]]:
    """Return the tokens that model.generate appends to each prompt, padded after eos up to the longest one.

    Prompts are padded on the left. One that occurs several times is read once if key_value_cache.can_extend_cache
    allows it. If a row may pass the switch of longrope.py, each prompt is continued separately.
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
    if len(distinct) < len(prompts) and longest > 1 and can_extend_cache(model):
        _, cache = extend_cache(model, ids[:, :-1], seen[:, :-1])
        cache.batch_select_indices(rows)
        read["cache"] = cache
    return model.generate(ids[rows], attention_mask=seen[rows], **read)[:, longest:].tolist()


def continue_all(
    prompts: Sequence[list[int]], model: Any, settings: GenerationConfig, batch_size: int | None = None
) -> list[list[int]]:
    """Return the tokens that follow each prompt under these settings, which name a pad_token_id; see continue_prompts.

    batch_size: prompts that are continued together; by default 16, or as many as have 4096 tokens together.
    """
    batch_size = batch_size or min(16, max(1, _TOKENS_TOGETHER // max(map(len, prompts), default=1)))
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # similar lengths together: less padding
    found: list[list[int]] = [[] for _ in prompts]
    with torch.no_grad(), generating(model, settings):
        for start in range(0, len(order), batch_size):
            picked = order[start : start + batch_size]
            for i, tokens in zip(picked, continue_prompts([prompts[i] for i in picked], model, settings.pad_token_id)):
                found[i] = tokens
    return found


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


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Return the tokens that end an answer: those that the model and its tokenizer name."""
    said = getattr(model.generation_config, "eos_token_id", None)
    found = [*(said if isinstance(said, list) else [said]), tokenizer.eos_token_id]
    return list(dict.fromkeys(token for token in found if token is not None))


def tokens_before(ends: Collection[int], tokens: Sequence[int]) -> list[int]:
    """Return the tokens before the first of ends."""
    return list(itertools.takewhile(lambda token: token not in ends, tokens))


def text_before(ends: Collection[int], tokens: Sequence[int], tokenizer: Any) -> str:
    """Return the text before the first of ends, without white space at its own ends."""
    return tokenizer.decode(tokens_before(ends, tokens), clean_up_tokenization_spaces=False).strip()
