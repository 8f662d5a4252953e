"""Answers in openai's own types: whole, or as the events of a stream."""

import json
import time
from collections.abc import Iterator
from typing import Any

from openai.types import Completion, CompletionChoice, CompletionUsage
from openai.types.chat import ChatCompletion, ChatCompletionChunk, ChatCompletionMessage
from openai.types.chat.chat_completion import Choice
from openai.types.chat.chat_completion_chunk import Choice as ChunkChoice
from openai.types.chat.chat_completion_chunk import ChoiceDelta
from pydantic import BaseModel

from mft.serving.batch.generation import Finish
from mft.serving.refusal import Refused

END = "data: [DONE]\n\n"


class TextAnswer:
    """POST /v1/completions"""

    prefix = "cmpl"

    def __init__(self, model: str, request_id: str) -> None:
        self.id = f"{self.prefix}-{request_id}"
        self._common: dict[str, Any] = {"id": self.id, "created": int(time.time()), "model": model}

    def whole(self, text: str, finish: Finish, usage: CompletionUsage) -> dict[str, Any]:
        choice = CompletionChoice(index=0, text=text, finish_reason=finish)
        return Completion(object="text_completion", choices=[choice], usage=usage, **self._common).model_dump()

    def first(self) -> list[str]:
        """Return the events before any text."""
        return []

    def piece(self, text: str, finish: Finish | None) -> Iterator[str]:
        # Unchecked: openai's type fits only the last event, which has a finish_reason.
        choice = CompletionChoice.model_construct(index=0, text=text, logprobs=None, finish_reason=finish)
        yield event(Completion.model_construct(object="text_completion", choices=[choice], **self._common))

    def usage(self, usage: CompletionUsage) -> str:
        return event(Completion(object="text_completion", choices=[], usage=usage, **self._common))


class ChatAnswer(TextAnswer):
    """POST /v1/chat/completions"""

    prefix = "chatcmpl"

    def whole(self, text: str, finish: Finish, usage: CompletionUsage) -> dict[str, Any]:
        message = ChatCompletionMessage(role="assistant", content=text)
        choice = Choice(index=0, message=message, finish_reason=finish)
        return ChatCompletion(object="chat.completion", choices=[choice], usage=usage, **self._common).model_dump()

    def first(self) -> list[str]:
        return [self._event(ChoiceDelta(role="assistant", content=""), None)]

    def piece(self, text: str, finish: Finish | None) -> Iterator[str]:
        if text:
            yield self._event(ChoiceDelta(content=text), None)
        if finish is not None:
            yield self._event(ChoiceDelta(), finish)

    def usage(self, usage: CompletionUsage) -> str:
        return event(ChatCompletionChunk(object="chat.completion.chunk", choices=[], usage=usage, **self._common))

    def _event(self, delta: ChoiceDelta, finish: Finish | None) -> str:
        choice = ChunkChoice(index=0, delta=delta, finish_reason=finish)
        return event(ChatCompletionChunk(object="chat.completion.chunk", choices=[choice], **self._common))


def event(chunk: BaseModel) -> str:
    return f"data: {chunk.model_dump_json(exclude_unset=True)}\n\n"


def refusal_event(refused: Refused) -> str:
    """Return the event that ends a stream whose answer is refused."""
    return f"data: {json.dumps(refused.body())}\n\n"
