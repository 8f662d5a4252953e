"""Exact match: continue each row's prompt greedily and compare the text with the row's completion."""

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from mft.checks import check_one_of
from mft.data.batches import take_rows
from mft.evaluation.continuation import continue_prompts, generating, text_before
from mft.evaluation.questions import split_row
from mft.evaluation.verifiers import VERIFIERS


def exact_matches(
    model: nn.Module,
    tokenizer: Any,
    dataset,
    *,
    batch_size: int = 16,
    max_new_tokens: int = 32,
    verifier: str = "exact",
) -> tuple[Tensor, Tensor]:
    """Return (correct answers, questions) per document: int64 (documents,) in ascending order of document number.

    A row's prompt is the text before its first scored token. Its completion is the scored tokens, up to eos. The greedy
    continuation, up to eos or max_new_tokens, must be the same text except for white space at its ends.

    Args:
        model: A model that can generate, with or without masked layers. Its mode (train or eval) is restored.
        dataset: Rows with one prompt and one completion each, as load_splits makes them for validation and test.
        batch_size: Number of prompts that are continued together. It changes the result only by rounding.
        verifier: "exact", or "last_number": the last number of the continuation must equal the completion's last
            number, and the completion itself may be longer than max_new_tokens.
    Raises: ValueError if a row has no prompt, or not exactly one completion that ends with eos within max_new_tokens.
    """
    check_one_of("verifier", verifier, tuple(VERIFIERS))
    if len(dataset) == 0:
        raise ValueError("dataset must hold at least one row to answer, got 0")
    eos = tokenizer.eos_token_id
    batch = take_rows(dataset, list(range(len(dataset))))
    most = max_new_tokens if verifier == "exact" else None
    rows = [split_row(*row, eos, most) for row in zip(batch.rows, batch.input_ids, batch.labels)]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]))  # similar lengths together: less padding
    answers: Counter[int] = Counter()
    greedy = GenerationConfig(max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=eos, pad_token_id=eos)
    with torch.no_grad(), generating(model, greedy):
        for start in range(0, len(order), batch_size):
            picked = order[start : start + batch_size]
            found = continue_prompts([rows[i][0] for i in picked], model, eos)
            for i, tokens in zip(picked, found):
                texts = (text_before(eos, each, tokenizer) for each in (tokens, rows[i][1]))
                answers[batch.documents[i]] += VERIFIERS[verifier](*texts)
    questions = Counter(batch.documents)
    numbers = sorted(questions)
    return torch.tensor([answers[n] for n in numbers]), torch.tensor([questions[n] for n in numbers])
