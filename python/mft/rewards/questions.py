"""Turn rows into questions, and compute the rewards of sampled answers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mft.evaluation.continuation import text_before
from mft.evaluation.exchanges import split_rows
from mft.evaluation.verifiers import VERIFIERS
from mft.rewards.config import RewardsConfig


@dataclass(frozen=True)
class Question:
    """A prompt as tokens, and the data's answer as text, for the verifier."""

    prompt: list[int]
    answer: str


def questions_of(dataset, tokenizer: Any, config: RewardsConfig) -> list[Question]:
    """Return the questions of all rows. Raises: ValueError as exact_matches, or for too few or unverifiable ones."""
    eos, longest = tokenizer.eos_token_id, config.max_completion_tokens if config.verifier == "exact" else None
    found = [
        Question(each.prompt, text_before([eos], each.completion, tokenizer))
        for each in split_rows(dataset, eos, longest)
    ]
    if len(found) < config.questions:
        raise ValueError(
            f"dataset must hold at least as many questions as a step asks, questions = {config.questions}, got "
            f"{len(found)}"
        )
    verify = VERIFIERS[config.verifier]
    for question in found:
        verify("", question.answer)  # raises if the verifier cannot use the data's answer
    return found


def count_questions(dataset) -> int:
    """Return the number of questions that questions_of would return."""
    if "starts" not in dataset.column_names:
        return len(dataset)
    return sum(map(len, dataset.with_format(None)["starts"]))


def rewards_of(
    answers: Sequence[Sequence[int]], asked: Sequence[Question], tokenizer: Any, config: RewardsConfig
) -> list[float]:
    """Return 1.0 for each correct answer (tokens), 0.0 for the others."""
    verify, eos = VERIFIERS[config.verifier], tokenizer.eos_token_id
    pairs = zip(answers, asked, strict=True)
    return [float(verify(text_before([eos], tokens, tokenizer), question.answer)) for tokens, question in pairs]


def share_that_differs(rewards: Sequence[float], num_generations: int) -> float:
    """Return the share of questions whose answers are neither all correct nor all wrong: only these teach."""
    groups = torch.tensor(rewards).view(-1, num_generations)
    return (groups != groups[:, :1]).any(-1).double().mean().item()
