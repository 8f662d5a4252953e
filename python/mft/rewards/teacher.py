"""The teacher of an on-policy distillation: it tells what it would have said at every word of the model's own answers.

Agarwal et al., arXiv 2306.13649. One that is shown more than the model, as the right answer, may be the model itself.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mft.checks import check_rule
from mft.rewards.questions import Question

QUESTION, ANSWER = "{question}", "{answer}"
_FIELD = re.compile(r"\{\w*\}")


@dataclass(frozen=True)
class OnPolicyTeacher:
    """Of what its answers' tokens are taught.

    Attributes:
        model: of the same tokenizer; the call freezes it, in eval mode. None: the model as the call found it, of which
            what is trained is copied.
        prompt: what the teacher reads before an answer: {question} stands for the model's own prompt, {answer} for the
            data's answer, anything else for itself.
    Raises: ValueError for a prompt without the question, or with other fields.
    """

    model: Any = None
    prompt: str = QUESTION

    def __post_init__(self) -> None:
        check_prompt(self.prompt, "prompt")

    def prompts(self, questions: Sequence[Question], tokenizer: Any) -> list[list[int]]:
        """The tokens that it reads before an answer to each."""
        return [_filled(self.prompt, question, tokenizer) for question in questions]


@dataclass(frozen=True)
class Teaching:
    """A teacher at work: its frozen model, and the tokens that it reads before an answer to each question."""

    model: Any
    prompts: Sequence[Sequence[int]]


def check_prompt(prompt: str, name: str) -> None:
    """Raise ValueError unless it holds {question}, and of other fields {answer} alone."""
    fields = _FIELD.findall(prompt)
    others = [field for field in fields if field not in (QUESTION, ANSWER)]
    check_rule(QUESTION in fields, name, f"hold {QUESTION}", prompt)
    check_rule(not others, name, f"have no fields but {QUESTION} and {ANSWER}", prompt)


def _filled(prompt: str, question: Question, tokenizer: Any) -> list[int]:
    """Text between two questions is tokenized as one piece; what begins a document stays at its beginning."""
    begins = question.prompt[:1] if question.prompt[:1] == [tokenizer.bos_token_id] else []
    words = question.prompt[len(begins) :]
    tokens = list(begins)
    for number, text in enumerate(prompt.split(QUESTION)):  # before answers are filled in, which may look like fields
        tokens += words if number else []
        piece = text.replace(ANSWER, question.answer)
        tokens += tokenizer.encode(piece, add_special_tokens=False) if piece else []
    return tokens
