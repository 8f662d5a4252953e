"""One answer while it is generated: its prompt, how its tokens are chosen, when it ends, who takes its pieces."""

import logging
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mft.serving.batch.answer_text import AnswerText
from mft.serving.batch.logprobs import TokenLogprob, token_logprobs
from mft.serving.batch.sampling import Sampling
from mft.serving.refusal import Refused, failure

Finish = Literal["stop", "length"]
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Piece:
    """Some text of an answer. finish: set in the last piece. refused: set instead if the answer ends incomplete.

    logprobs: of the tokens since the piece before, if they are wanted.
    """

    text: str
    finish: Finish | None = None
    refused: Refused | None = None
    logprobs: Sequence[TokenLogprob] = ()


class Generation:
    """One answer.

    Args:
        max_tokens: most tokens of the answer. With 0, only the prompt is read.
        ends: tokens that end it.
        take: called with each piece, on the thread that generates them.
        logprobs: the number of likeliest tokens to name with each token's log-probability; None for none of both.
        reads_prompt: whether those of the prompt's tokens are wanted too; see_prompt must then be called.
    """

    def __init__(
        self,
        task: str | None,
        prompt: Sequence[int],
        max_tokens: int,
        sampling: Sampling,
        text: AnswerText,
        ends: Collection[int],
        take: Callable[[Piece], object],
        *,
        logprobs: int | None = None,
        reads_prompt: bool = False,
    ) -> None:
        self.task, self.prompt, self.reads_prompt = task, prompt, reads_prompt
        self._max_tokens, self._sampling, self._text, self._ends, self._take = max_tokens, sampling, text, ends, take
        self._top = logprobs
        self._logprobs: list[TokenLogprob] = []  # that no piece has yet
        self._seen = 0  # positions of the prompt whose logits have been seen
        self.key = ""  # the name of the client's key
        self.chosen: list[int] = []  # the tokens so far, including the one that ends the answer
        self.is_over = False
        self.is_cancelled = False  # by the client; any thread may set it
        self.began, self.joined, self.first, self.ended = time.monotonic(), 0.0, 0.0, 0.0

    @property
    def tokens(self) -> int:
        """The number of tokens so far."""
        return len(self.chosen)

    def see_prompt(self, start: int, logits: Tensor) -> None:
        """Take logits (n, V) at the prompt's positions from start on. A prompt that is read again changes nothing."""
        with self.isolating_errors():
            begin, self._seen = max(start, self._seen), max(self._seen, start + len(logits))
            if begin == 0:
                self._logprobs.append(TokenLogprob(self.prompt[0]))
            following = self.prompt[begin + 1 : self._seen + 1]
            self._logprobs += token_logprobs(logits[begin - start :], following, self._top or 0)

    def advance(self, logits: Tensor, likeliest: int, *, is_nan: bool) -> None:
        """Choose one more token from logits (V,), whose largest one is the likeliest token's."""
        with self.isolating_errors():
            if is_nan:
                raise Refused("the model's logits must be numbers, got NaN", status=500)
            self.first = self.first or time.monotonic()
            text, finish = self._add(logits, likeliest) if self._max_tokens else ("", None)
            if finish is None and self.tokens == self._max_tokens:
                text, finish = text + self._text.rest(), "length"
            if finish is not None:
                self._end()
            if text or finish is not None:
                logprobs, self._logprobs = self._logprobs, []
                self._take(Piece(text, finish, logprobs=logprobs))

    def _add(self, logits: Tensor, likeliest: int) -> tuple[str, Finish | None]:
        token = likeliest if self._sampling.is_plain else self._sampling.choose(logits, self.chosen)
        self.chosen.append(token)
        if self._top is not None:
            self._logprobs += token_logprobs(logits[None], [token], self._top)
        if token in self._ends:
            return self._text.rest(), "stop"
        return self._text.add(token), "stop" if self._text.stopped else None

    @contextmanager
    def isolating_errors(self) -> Iterator[None]:
        """Let an error in the block end only this answer. The block must not change what answers share."""
        try:
            yield
        except Refused as refused:
            self.refuse(refused)
        except torch.AcceleratorError:  # the device is lost for all answers
            raise
        except Exception:  # from the tokenizer or the model with this client's tokens; the log has the traceback
            logger.exception("one answer failed, the others go on")
            self.refuse(failure())

    def refuse(self, refused: Refused) -> None:
        """End the answer without the rest."""
        self._end()
        self._take(Piece("", refused=refused))

    def _end(self) -> None:
        self.is_over, self.ended = True, time.monotonic()


def advance_all(generations: Sequence[Generation], logits: Tensor) -> None:
    """Choose one more token for each generation from its row of logits (rows, V)."""
    largest, likeliest = logits.max(-1)  # the largest of a row with a NaN is NaN
    found = torch.stack((likeliest, largest.isnan().long())).tolist()
    for generation, row, token, is_nan in zip(generations, logits, *found, strict=True):
        generation.advance(row, token, is_nan=bool(is_nan))
