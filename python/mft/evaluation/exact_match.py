"""Exact match: continue each row's prompt greedily and compare the text with the row's completion."""

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from mft.data.batches import take_rows
from mft.data.tokenization import IGNORED


def exact_matches(
    model: nn.Module, tokenizer: Any, dataset, *, batch_size: int = 16, max_new_tokens: int = 32
) -> tuple[Tensor, Tensor]:
    """(answers, questions), int64 (documents,) in ascending order of document number: exact ones, and all.

    A row's prompt is what precedes its first scored token, its completion the scored tokens after it, up to eos. The
    greedy continuation, up to eos or max_new_tokens, must be the same text but for white space at its ends.

    Args:
        model: as generate takes it, masked layers included; left in the mode (train or eval) that it was in.
        dataset: rows with one prompt and one completion each, as load_splits makes them for validation and test.
        batch_size: prompts continued together; it changes the result by rounding alone.
    Raises: ValueError if a row has no prompt, or not one completion that ends, within max_new_tokens, with eos.
    """
    if len(dataset) == 0:
        raise ValueError("dataset must hold at least one row to answer, got 0")
    eos = tokenizer.eos_token_id
    batch = take_rows(dataset, list(range(len(dataset))))
    rows = [_split(*row, eos, max_new_tokens) for row in zip(batch.rows, batch.input_ids, batch.labels)]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]))  # similar lengths together: less padding
    answers: Counter[int] = Counter()
    with torch.no_grad(), _greedy(model, max_new_tokens, eos):
        for start in range(0, len(order), batch_size):
            picked = order[start : start + batch_size]
            found = _continue([rows[i][0] for i in picked], model, eos)
            for i, tokens in zip(picked, found):
                answers[batch.documents[i]] += _text(tokens, tokenizer) == _text(rows[i][1], tokenizer)
    questions = Counter(batch.documents)
    numbers = sorted(questions)
    return torch.tensor([answers[n] for n in numbers]), torch.tensor([questions[n] for n in numbers])


def _split(row: int, ids: Tensor, labels: Tensor, eos: int, max_new_tokens: int) -> tuple[list[int], list[int]]:
    """(prompt, completion) of a row."""
    scored = (labels != IGNORED).nonzero().flatten().tolist()
    rule = None
    if not scored or scored[0] == 0:
        rule = "have a prompt that is not scored and a completion that is"
    elif scored[-1] - scored[0] + 1 != len(scored):
        rule = "have one completion, scored in one piece: load it without packing"
    elif ids[scored[-1]] != eos:
        rule = "end its completion with eos: it was cut off, so raise data.sequence_length"
    elif len(scored) > max_new_tokens:
        rule = f"be answerable in max_new_tokens = {max_new_tokens}, eos included"
    if rule is not None:
        raise ValueError(f"row {row} of dataset must {rule}, got {len(scored)} scored tokens of {len(ids)}")
    return ids[: scored[0]].tolist(), ids[scored].tolist()


def _continue(prompts: list[list[int]], model: Any, pad: int) -> list[list[int]]:
    """Greedy continuations of prompts, padded on the left so that all end where generation begins.

    generate counts positions from the attention mask, so the padding shifts nobody's.
    """
    longest = max(map(len, prompts))
    device = next(model.parameters()).device
    ids = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in prompts], device=device)
    seen = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    return model.generate(ids, attention_mask=seen)[:, longest:].tolist()


@contextlib.contextmanager
def _greedy(model: Any, max_new_tokens: int, eos: int) -> Iterator[None]:
    """In eval mode, without the model's own generation settings: generate would fill ours up with its penalties."""
    was_training, settings = model.training, model.generation_config
    model.eval()
    model.generation_config = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=eos, pad_token_id=eos
    )
    try:
        yield
    finally:
        model.generation_config = settings
        model.train(was_training)


def _text(tokens: list[int], tokenizer: Any) -> str:
    """What stands before eos."""
    eos = tokenizer.eos_token_id
    end = tokens.index(eos) if eos in tokens else len(tokens)
    return tokenizer.decode(tokens[:end], clean_up_tokenization_spaces=False).strip()
