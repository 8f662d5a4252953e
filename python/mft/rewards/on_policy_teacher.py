"""The teacher of an on-policy distillation: it gives its distribution at each token of the model's own answers.

Agarwal et al., arXiv 2306.13649. A teacher whose prompt has more than the model's, such as the correct answer, may be
the model itself.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mft.checks import check_rule

if TYPE_CHECKING:
    from mft.rewards.questions import Question

QUESTION, ANSWER = "{question}", "{answer}"
_FIELD = re.compile(r"\{\w*\}")


@dataclass(frozen=True)
class OnPolicyTeacher:
    """The teacher of on-policy distillation, for train_rewards.

    Attributes:
        model: A model with the same tokenizer. train_rewards freezes it and sets eval mode. None: the model as it is
            when train_rewards is called; its trained parameters are copied.
        prompt: The text that the teacher reads before an answer. {question} stands for the model's own prompt, {answer}
            for the data's answer; other text is used as it is.
    Raises: ValueError if prompt lacks {question} or has other fields.
    """

    model: Any = None
    prompt: str = QUESTION

    def __post_init__(self) -> None:
        check_prompt(self.prompt, "prompt")

    def prompts(self, questions: "Sequence[Question]", tokenizer: Any) -> list[list[int]]:
        """Return the tokens that the teacher reads before an answer, for each question."""
        return [_fill(self.prompt, question, tokenizer) for question in questions]


@dataclass(frozen=True)
class Teaching:
    """A teacher in use: its frozen model, and the tokens that it reads before an answer to each question."""

    model: Any
    prompts: Sequence[Sequence[int]]


def check_prompt(prompt: str, name: str) -> None:
    """Raise ValueError if prompt lacks {question}, or has a field other than {question} and {answer}."""
    fields = _FIELD.findall(prompt)
    others = [field for field in fields if field not in (QUESTION, ANSWER)]
    check_rule(QUESTION in fields, name, f"hold {QUESTION}", prompt)
    check_rule(not others, name, f"have no fields but {QUESTION} and {ANSWER}", prompt)


def _fill(prompt: str, question: "Question", tokenizer: Any) -> list[int]:
    """Return the tokens of the filled prompt. Text between two questions is tokenized as one piece; bos stays first."""
    begins = question.prompt[:1] if question.prompt[:1] == [tokenizer.bos_token_id] else []
    words = question.prompt[len(begins) :]
    tokens = list(begins)
    for number, text in enumerate(prompt.split(QUESTION)):  # before answers, which may look like fields, are filled in
        tokens += words if number else []
        piece = text.replace(ANSWER, question.answer)
        tokens += tokenizer.encode(piece, add_special_tokens=False) if piece else []
    return tokens
