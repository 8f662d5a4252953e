"""One answer while it is made: what it goes on from, how its tokens are chosen, when it ends, who takes its pieces."""

import logging
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mft.serving.batch.answer_text import AnswerText
from mft.serving.batch.sampling import Sampling
from mft.serving.refusal import Refused, failure

Finish = Literal["stop", "length"]
logger = logging.getLogger(__name__)


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
        with self.on_its_own():
            self.last = self._sampling.choose(logits)
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

    @contextmanager
    def on_its_own(self) -> Iterator[None]:
        """An error in here ends this answer, and no other: nothing may be changed in here that answers share."""
        try:
            yield
        except FloatingPointError as error:
            self.refuse(Refused(str(error), status=500))
        except torch.AcceleratorError:  # the device is lost, for every answer
            raise
        except Exception:  # whatever one client's tokens make a tokenizer or a model raise; the log has the traceback
            logger.exception("one answer failed, the others go on")
            self.refuse(failure())

    def refuse(self, refused: Refused) -> None:
        """End it without the rest."""
        self._end()
        self._take(Piece("", refused=refused))

    def _end(self) -> None:
        self.is_over, self.ended = True, time.monotonic()
