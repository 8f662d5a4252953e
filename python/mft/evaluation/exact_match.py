"""Exact match: continue each row's prompt greedily and compare the text with the row's completion."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from mft.checks import check_one_of
from mft.evaluation.continuation import continue_all, text_before
from mft.evaluation.evaluate import Evaluation
from mft.evaluation.exchanges import Exchange, split_rows
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
    continuation must be the same text except for white space at its ends.
    Args:
        dataset: Rows with one prompt and one completion each, as load_splits makes them for validation and test.
        verifier: "exact", or "last_number": the last number of the continuation must equal the completion's last
            number, and the completion itself may be longer than max_new_tokens.
    Raises: ValueError if a row has no prompt, or not exactly one completion that ends with eos within max_new_tokens.
    """
    check_one_of("verifier", verifier, tuple(VERIFIERS))
    if len(dataset) == 0:
        raise ValueError("dataset must hold at least one row to answer, got 0")
    eos = tokenizer.eos_token_id
    asked = split_rows(dataset, eos, max_new_tokens if verifier == "exact" else None)
    settings = greedy([eos], max_new_tokens)
    matches = match_answers(model, tokenizer, asked, settings, batch_size=batch_size, verifier=verifier)
    return matches.correct, matches.tokens


def greedy(ends: Sequence[int], max_new_tokens: int) -> GenerationConfig:
    """Return the settings of answers that continue greedily up to one of ends, which are tokens."""
    return GenerationConfig(max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=[*ends], pad_token_id=ends[0])


def match_answers(
    model: Any,
    tokenizer: Any,
    asked: Sequence[Exchange],
    settings: GenerationConfig,
    *,
    batch_size: int | None = None,
    verifier: str = "exact",
) -> Evaluation:
    """Answer the prompts greedily (settings of greedy), and count the correct answers; the unit is an answer."""
    ends = settings.eos_token_id
    found = continue_all([each.prompt for each in asked], model, settings, batch_size)
    correct: Counter[int] = Counter()
    for each, tokens in zip(asked, found):
        texts = (text_before(ends, part, tokenizer) for part in (tokens, each.completion))
        correct[each.document] += VERIFIERS[verifier](*texts)
    count = Counter(each.document for each in asked)
    documents = torch.tensor(sorted(count))
    answers, right = (torch.tensor([counter[n] for n in documents.tolist()]) for counter in (count, correct))
    return Evaluation(documents, answers, torch.full(answers.shape, torch.nan), right)
