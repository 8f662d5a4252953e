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
from mft.serving.batch.sampling import Sampling
from mft.serving.refusal import Refused, failure

Finish = Literal["stop", "length"]
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Piece:
    """Some text of an answer. finish: set in the last piece. refused: set instead if the answer ends incomplete."""

    text: str
    finish: Finish | None = None
    refused: Refused | None = None


class Generation:
    """One answer. ends: tokens that end it. take: is called with each piece, on the thread that generates them."""

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
        self.tokens = 0  # generated so far, including the token that ends the answer
        self.last = -1  # the latest token
        self.is_over = False
        self.is_cancelled = False  # by the client; any thread may set it
        self.began, self.joined, self.first, self.ended = time.monotonic(), 0.0, 0.0, 0.0

    def advance(self, logits: Tensor) -> None:
        """Choose one more token from logits (V,)."""
        with self.isolating_errors():
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
    def isolating_errors(self) -> Iterator[None]:
        """Let an error in the block end only this answer. The block must not change what answers share."""
        try:
            yield
        except FloatingPointError as error:
            self.refuse(Refused(str(error), status=500))
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
