"""The text of an answer, released piece by piece: never half a character, never what may become a stop string."""

from collections.abc import Sequence
from typing import Any

_HALF = "\N{REPLACEMENT CHARACTER}"  # what a tokenizer writes for bytes of a character that are not all there yet


class AnswerText:
    def __init__(self, tokenizer: Any, stops: Sequence[str]) -> None:
        self._tokenizer, self._stops = tokenizer, stops
        self._tokens: list[int] = []
        self._text = ""
        self._released = 0
        self.stopped = False  # a stop string has come; the text ends before it

    def add(self, token: int) -> str:
        """What one more token releases."""
        self._tokens.append(token)
        # From the first token on, as a token's text depends on those before: 0.17 ms for 1,000 tokens of SmolLM2.
        self._text = self._tokenizer.decode(self._tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        found = [at for stop in self._stops if (at := self._text.find(stop, self._released)) >= 0]
        if found:
            self.stopped, self._text = True, self._text[: min(found)]
            return self.rest()
        return self._release(min(len(self._text.rstrip(_HALF)), len(self._text) - self._begun_stop()))

    def rest(self) -> str:
        """What was held back, when no more tokens come."""
        return self._release(len(self._text))

    def _begun_stop(self) -> int:
        """Characters at the end that a stop string may begin with."""
        return max(
            (length for stop in self._stops for length in range(1, len(stop)) if self._text.endswith(stop[:length])),
            default=0,
        )

    def _release(self, end: int) -> str:
        piece = self._text[self._released : end]
        self._released = max(self._released, end)
        return piece
