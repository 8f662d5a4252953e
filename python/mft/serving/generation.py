"""One answer while it is made: what it goes on from, how its tokens are chosen, when it ends, who takes its pieces."""

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from mft.serving.answer_text import AnswerText
from mft.serving.refusal import Refused
from mft.serving.sampling import Sampling

Finish = Literal["stop", "length"]


@dataclass(frozen=True)
class Piece:
    """Some text, perhaps the last; or, instead of the rest, why there is none."""

    text: str
    finish: Finish | None = None
    refused: Refused | None = None


class Generation:
    """Args: ends: tokens after which nothing comes; take: is called with each piece, on the thread that makes them."""

    def __init__(
        self,
        task: str | None,
        prompt: Sequence[int],
        max_tokens: int,
        sampling: Sampling,
        text: AnswerText,
        ends: Collection[int],
        take: Callable[[Piece], object],
    ) -> None:
        self.task, self.prompt = task, prompt
        self._max_tokens, self._sampling, self._text, self._ends, self._take = max_tokens, sampling, text, ends, take
        self.tokens = 0  # that were made, the last one of ends among them
        self.last = -1  # of them
        self.is_over = False
        self.is_cancelled = False  # by the client; any thread may say so
        self.began, self.joined, self.first, self.ended = time.monotonic(), 0.0, 0.0, 0.0

    def advance(self, logits: Tensor) -> None:
        """One more token, of logits (V,)."""
        try:
            self.last = self._sampling.choose(logits)
        except FloatingPointError as error:
            self.refuse(Refused(str(error), status=500))
            return
        self.tokens += 1
        self.first = self.first or time.monotonic()
        finish: Finish | None = None
        if self.last in self._ends:
            text, finish = self._text.rest(), "stop"
        else:
            text = self._text.add(self.last)
            if self._text.stopped:
                finish = "stop"
            elif self.tokens == self._max_tokens:
                text, finish = text + self._text.rest(), "length"
        if finish is not None:
            self._end()
        if text or finish is not None:
            self._take(Piece(text, finish))

    def refuse(self, refused: Refused) -> None:
        """End it without the rest."""
        self._end()
        self._take(Piece("", refused=refused))

    def _end(self) -> None:
        self.is_over, self.ended = True, time.monotonic()
