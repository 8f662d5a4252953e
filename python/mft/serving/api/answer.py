"""Answers in openai's own types: whole, or as the events of a stream."""

import json
import time
from collections.abc import Iterator, Sequence
from typing import Any

from openai.types import Completion, CompletionChoice, CompletionUsage
from openai.types.chat import ChatCompletion, ChatCompletionChunk, ChatCompletionMessage, ChatCompletionTokenLogprob
from openai.types.chat.chat_completion import Choice, ChoiceLogprobs
from openai.types.chat.chat_completion_chunk import Choice as ChunkChoice
from openai.types.chat.chat_completion_chunk import ChoiceDelta
from openai.types.chat.chat_completion_chunk import ChoiceLogprobs as ChunkLogprobs
from openai.types.chat.chat_completion_token_logprob import TopLogprob
from openai.types.completion_choice import Logprobs
from pydantic import BaseModel

from mft.serving.api.token_texts import Offsets, TokenTexts
from mft.serving.batch.generation import Finish, Piece
from mft.serving.batch.logprobs import TokenLogprob
from mft.serving.refusal import Refused

END = "data: [DONE]\n\n"


class TextAnswer:
    """POST /v1/completions. echoes: for each choice, the prompt's text if the choice begins with it."""

    prefix = "cmpl"

    def __init__(self, model: str, request_id: str, texts: TokenTexts, echoes: Sequence[str]) -> None:
        self.id, self._texts = f"{self.prefix}-{request_id}", texts
        self._offsets = [Offsets(texts, echo) for echo in echoes]  # for each choice
        self._common: dict[str, Any] = {"id": self.id, "created": int(time.time()), "model": model}

    def whole(self, made: Sequence[Piece], usage: CompletionUsage) -> dict[str, Any]:
        """Return the body of an answer with a piece for each choice, which is all of it."""
        choices = [
            CompletionChoice(index=i, text=it.text, logprobs=self._logprobs(i, it), finish_reason=it.finish)  # type: ignore[arg-type]
            for i, it in enumerate(made)
        ]
        return Completion(object="text_completion", choices=choices, usage=usage, **self._common).model_dump(
            warnings=False
        )

    def first(self) -> list[str]:
        """Return the events before any text."""
        return []

    def piece(self, index: int, it: Piece) -> Iterator[str]:
        # Unchecked: openai's type fits only the last event, which has a finish_reason.
        logprobs = self._logprobs(index, it)
        choice = CompletionChoice.model_construct(index=index, text=it.text, logprobs=logprobs, finish_reason=it.finish)
        yield event(Completion.model_construct(object="text_completion", choices=[choice], **self._common))

    def usage(self, usage: CompletionUsage) -> str:
        return event(Completion(object="text_completion", choices=[], usage=usage, **self._common))

    def _logprobs(self, index: int, it: Piece) -> Logprobs | None:
        if not it.logprobs:
            return None
        tokens, offsets = zip(*(self._offsets[index].add(each.token) for each in it.logprobs), strict=True)
        values = [each.logprob for each in it.logprobs]
        # Unchecked: by openai's type, no value is None, as the one of a prompt's first token is.
        return Logprobs.model_construct(
            tokens=[*tokens],
            token_logprobs=values,
            top_logprobs=[self._likeliest(each) for each in it.logprobs],
            text_offset=[*offsets],
        )

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

    prefix = "chatcmpl"

    def whole(self, made: Sequence[Piece], usage: CompletionUsage) -> dict[str, Any]:
        choices = [
            Choice(
                index=index,
                message=ChatCompletionMessage(role="assistant", content=it.text),
                logprobs=ChoiceLogprobs(content=self._content(it)) if it.logprobs else None,
                finish_reason=it.finish,  # type: ignore[arg-type]
            )
            for index, it in enumerate(made)
        ]
        return ChatCompletion(object="chat.completion", choices=choices, usage=usage, **self._common).model_dump()

    def first(self) -> list[str]:
        return [self._event(index, ChoiceDelta(role="assistant", content="")) for index in range(len(self._offsets))]

    def piece(self, index: int, it: Piece) -> Iterator[str]:
        if it.text or it.logprobs:
            yield self._event(index, ChoiceDelta(content=it.text), it)
        if it.finish is not None:
            yield self._event(index, ChoiceDelta(), finish=it.finish)

    def usage(self, usage: CompletionUsage) -> str:
        return event(ChatCompletionChunk(object="chat.completion.chunk", choices=[], usage=usage, **self._common))

    def _event(self, index: int, delta: ChoiceDelta, it: Piece | None = None, finish: Finish | None = None) -> str:
        choice = ChunkChoice(index=index, delta=delta, finish_reason=finish)
        if it is not None and it.logprobs:
            choice.logprobs = ChunkLogprobs(content=self._content(it))
        return event(ChatCompletionChunk(object="chat.completion.chunk", choices=[choice], **self._common))

    def _content(self, it: Piece) -> list[ChatCompletionTokenLogprob]:
        def told(token: int, logprob: float) -> dict[str, Any]:
            text, data = self._texts.within(token)
            return {"token": text, "logprob": logprob, "bytes": [*data]}

        return [
            ChatCompletionTokenLogprob(
                **told(each.token, each.logprob),  # type: ignore[arg-type]
                top_logprobs=[TopLogprob(**told(*pair)) for pair in each.top],
            )
            for each in it.logprobs
        ]


def event(chunk: BaseModel) -> str:
    return f"data: {chunk.model_dump_json(exclude_unset=True, warnings=False)}\n\n"


def refusal_event(refused: Refused) -> str:
    """Return the event that ends a stream whose answer is refused."""
    return f"data: {json.dumps(refused.body())}\n\n"
