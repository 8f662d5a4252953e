"""Release the text of an answer piece by piece: never half a character, and nothing that may become a stop string."""

from collections.abc import Sequence
from typing import Any

HALF = "\N{REPLACEMENT CHARACTER}"  # what a tokenizer writes for an incomplete character
_BEFORE = 5  # tokens that decide how the next one is written
_MOST = 64  # tokens that are decoded for each new one: 1,000 of SmolLM2 take 0.17 ms


class AnswerText:
    """The text of an answer.

    echo, prompt: text that comes before it, and its tokens; none by default. at_once: release all of it at the end.
    """

    def __init__(
        self,
        tokenizer: Any,
        stops: Sequence[str],
        echo: str = "",
        prompt: Sequence[int] = (),
        *,
        at_once: bool = False,
    ) -> None:
        self._tokenizer, self._stops, self._echo, self._at_once = tokenizer, stops, echo.rstrip(HALF), at_once
        self._tokens = [*prompt[-_BEFORE:]]
        self._text = self._decode(self._tokens) if prompt else ""
        self._released = len(self._text.rstrip(HALF))
        self.stopped = False  # whether a stop string has come; the text ends before it

    def add(self, token: int) -> str:
        """Add a token, and return the text that it releases."""
        self._tokens.append(token)
        if self._at_once and not self._stops:
            return ""
        self._text = self._decode(self._tokens)
        found = [at for stop in self._stops if (at := self._text.find(stop, self._released)) >= 0]
        if found:
            self.stopped, self._text = True, self._text[: min(found)]
            return self.rest()
        if self._at_once:
            return ""
        piece = self._release(min(len(self._text.rstrip(HALF)), len(self._text) - self._partial_stop()))
        if len(self._tokens) > _MOST and self._released == len(self._text):
            tail = self._tokens[-_BEFORE:]
            if HALF not in (text := self._decode(tail)):  # it does not begin within a character
                self._tokens, self._text, self._released = tail, text, len(text)
        return piece

    def rest(self) -> str:
        """Return the text that was held back. Call it after the last token."""
        if not self.stopped:
            self._text = self._decode(self._tokens)
        return self._release(len(self._text))

    def _decode(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _partial_stop(self) -> int:
        """Return the number of characters at the end of the text with which a stop string begins."""
        return max(
            (length for stop in self._stops for length in range(1, len(stop)) if self._text.endswith(stop[:length])),
            default=0,
        )

    def _release(self, end: int) -> str:
        piece, self._echo = self._echo + self._text[self._released : end], ""
        self._released = max(self._released, end)
        return piece
