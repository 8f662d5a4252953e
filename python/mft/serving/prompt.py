"""Tokenise a request's prompt, and compute how long its answer may become."""

from typing import Any

from jinja2 import TemplateError

from mft.serving.api.body import Body, ChatBody, CompletionBody
from mft.serving.refusal import Refused

_MAX_TOKENS = 16  # of /v1/completions, as with OpenAI


class Prompts:
    """Args:
    length: most tokens of prompt and answer together.
    max_tokens: most tokens of an answer if the request does not say. None means OpenAI's defaults: 16 for a text, all
        that fit for a chat.
    """

    def __init__(self, tokenizer: Any, length: int, max_tokens: int | None = None) -> None:
        self._tokenizer, self._length, self._max_tokens = tokenizer, length, max_tokens
        self._longest = max(map(len, tokenizer.get_vocab()))  # most characters of a token

    def read(self, body: Body) -> tuple[list[int], int]:
        """Return (tokens of the prompt, most tokens of the answer). Raises: Refused if they are none or too many."""
        if isinstance(body, ChatBody):
            param, tokens, default = "messages", self._chat(body), self._length
            asked = body.max_completion_tokens or body.max_tokens
        else:
            assert isinstance(body, CompletionBody)
            param, tokens, default = "prompt", self._completion(body), _MAX_TOKENS
            asked = body.max_tokens
        if not tokens:
            raise Refused(f"{param} must hold at least one token, got none", param=param)
        room = self._length - len(tokens)
        if room < 1:
            raise self._too_long(param, f"{len(tokens)}")
        if asked is None:
            return tokens, min(room, self._max_tokens or default)
        if asked > room:
            raise Refused(
                f"max_tokens must be at most {room}, the number that the {len(tokens)} tokens of {param} leave of "
                f"{self._length} (--length), got {asked}",
                param="max_tokens",
                code="context_length_exceeded",
            )
        return tokens, asked

    def _completion(self, body: CompletionBody) -> list[int]:
        if isinstance(body.prompt, str):
            self._check_text("prompt", len(body.prompt))
            return self._tokenizer(body.prompt)["input_ids"]
        known = len(self._tokenizer)
        unknown = [token for token in body.prompt if not 0 <= token < known]
        if unknown:
            raise Refused(f"prompt must hold tokens from 0 to {known - 1}, got {unknown[0]}", param="prompt")
        return body.prompt

    def _chat(self, body: ChatBody) -> list[int]:
        if not self._tokenizer.chat_template:
            raise Refused(
                "messages must go to a model with a chat template, got one without: ask /v1/completions, or give the "
                "base one",
                param="messages",
            )
        self._check_text("messages", sum(len(message.content) for message in body.messages))
        messages = [message.model_dump() for message in body.messages]
        try:
            return self._tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        except TemplateError as error:
            raise Refused(f"messages must be what the chat template takes: {error}", param="messages") from None

    def _check_text(self, param: str, characters: int) -> None:
        """Raise Refused, before the text is tokenised, if it is too long with any tokens."""
        least = characters // self._longest
        if least >= self._length:
            raise self._too_long(param, f"{least} or more")

    def _too_long(self, param: str, got: str) -> Refused:
        return Refused(
            f"{param} must be at most {self._length - 1} tokens, so that one more fits into {self._length} (--length), "
            f"got {got}",
            param=param,
            code="context_length_exceeded",
        )
