"""Answers in OpenAI's form: whole, or as the events of a stream. They are plain dicts, as each token has an event."""

import json
import time
from collections.abc import Sequence
from typing import Any

from mft.serving.api.token_texts import Offsets, TokenTexts
from mft.serving.batch.generation import Piece
from mft.serving.batch.logprobs import TokenLogprob

END = "data: [DONE]\n\n"


class TextAnswer:
    """POST /v1/completions. echoes: for each choice, the prompt's text if the choice begins with it."""

    prefix, kind, kind_of_event = "cmpl", "text_completion", "text_completion"

    def __init__(self, model: str, request_id: str, texts: TokenTexts, echoes: Sequence[str]) -> None:
        self.id, self._texts = f"{self.prefix}-{request_id}", texts
        self._offsets = [Offsets(texts, echo) for echo in echoes]  # for each choice
        self._common = {"id": self.id, "created": int(time.time()), "model": model}

    def whole(self, made: Sequence[Piece], usage: dict[str, int]) -> dict[str, Any]:
        """Return the body of an answer with a piece for each choice, which is all of it."""
        choices = [self._choice(index, it) for index, it in enumerate(made)]
        return {**self._common, "object": self.kind, "choices": choices, "usage": usage}

    def first(self) -> list[str]:
        """Return the events before any text."""
        return []

    def piece(self, index: int, it: Piece) -> str:
        return self._event(self._choice(index, it))

    def usage(self, usage: dict[str, int]) -> str:
        return self._event(usage=usage)

    def _event(self, *choices: dict[str, Any], **more: Any) -> str:
        return event({**self._common, "object": self.kind_of_event, "choices": choices, **more})

    def _choice(self, index: int, it: Piece) -> dict[str, Any]:
        return {"index": index, "text": it.text, "logprobs": self._logprobs(index, it), "finish_reason": it.finish}

    def _logprobs(self, index: int, it: Piece) -> dict[str, Any] | None:
        if not it.logprobs:
            return None
        tokens, offsets = zip(*(self._offsets[index].add(each.token) for each in it.logprobs), strict=True)
        return {
            "tokens": tokens,
            "token_logprobs": [each.logprob for each in it.logprobs],
            "top_logprobs": [self._likeliest(each) for each in it.logprobs],
            "text_offset": offsets,
        }

    def _likeliest(self, each: TokenLogprob) -> dict[str, float] | None:
        """Return log-probabilities by text, of the likeliest tokens and of the token itself."""
        if each.logprob is None:
            return None
        found: dict[str, float] = {}
        for token, logprob in (*each.top, (each.token, each.logprob)):  # of tokens with the same text, the likelier
            found.setdefault(self._texts.within(token)[0], logprob)
        return found


class ChatAnswer(TextAnswer):
    """POST /v1/chat/completions"""

    prefix, kind, kind_of_event = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def first(self) -> list[str]:
        role = {"role": "assistant", "content": ""}
        return [
            self._event({"index": index, "delta": role, "finish_reason": None}) for index in range(len(self._offsets))
        ]

    def piece(self, index: int, it: Piece) -> str:
        delta = {"content": it.text} if it.text else {}
        logprobs = self._logprobs(index, it)
        return self._event({"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": it.finish})

    def _choice(self, index: int, it: Piece) -> dict[str, Any]:
        message = {"role": "assistant", "content": it.text, "refusal": None}
        logprobs = self._logprobs(index, it)
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": it.finish}

    def _logprobs(self, index: int, it: Piece) -> dict[str, Any] | None:
        def told(token: int, logprob: float | None) -> dict[str, Any]:
            text, data = self._texts.within(token)
            return {"token": text, "logprob": logprob, "bytes": [*data]}

        if not it.logprobs:
            return None
        tokens = [
            {**told(each.token, each.logprob), "top_logprobs": [told(*pair) for pair in each.top]}
            for each in it.logprobs
        ]
        return {"content": tokens, "refusal": None}


def event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n"
