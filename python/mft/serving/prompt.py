"""Tokenise a request's prompts, and compute how long their answers may become."""

from dataclasses import dataclass, replace
from typing import Any

from jinja2 import TemplateError

from mft.serving.api.body import Body, Chat, ChatBody, CompletionBody, TokenizeBody
from mft.serving.refusal import Refused

_MAX_TOKENS = 16  # of /v1/completions, as with OpenAI


@dataclass(frozen=True)
class Prompt:
    """A prompt's tokens, the most tokens of its answer, and its text if the answer begins with it."""

    tokens: list[int]
    most: int
    echo: str | None = None


class Prompts:
    """Args:
    length: most tokens of prompt and answer together.
    max_tokens: most tokens of an answer if the request does not say. None means OpenAI's defaults: 16 for a text, all
        that fit for a chat.
    """

    def __init__(self, tokenizer: Any, length: int, max_tokens: int | None = None) -> None:
        self._tokenizer, self.length, self._max_tokens = tokenizer, length, max_tokens
        self._longest = max(map(len, tokenizer.get_vocab()))  # most characters of a token

    def read(self, body: Body) -> list[Prompt]:
        """Read a request's prompts. Raises: Refused if one has no tokens or too many."""
        if isinstance(body, ChatBody):
            asked = body.max_completion_tokens or body.max_tokens
            return [self._prompt("messages", self._chat(body), asked, self.length)]
        assert isinstance(body, CompletionBody)
        found = []
        for index, each in enumerate(body.prompt):
            param = "prompt" if len(body.prompt) == 1 else f"prompt[{index}]"
            tokens = self._text(param, each) if isinstance(each, str) else self._known(param, each)
            found.append(self._prompt(param, tokens, body.max_tokens, _MAX_TOKENS))
            if body.echo:
                text = each if isinstance(each, str) else self._tokenizer.decode(each)
                found[-1] = replace(found[-1], echo=text)
        return found

    def tokenize(self, body: TokenizeBody) -> list[int]:
        """Return the tokens of a text or a chat. Raises: Refused."""
        return self._chat(body) if body.prompt is None else self._text("prompt", body.prompt, body.add_special_tokens)

    def _prompt(self, param: str, tokens: list[int], asked: int | None, default: int) -> Prompt:
        if not tokens:
            raise Refused(f"{param} must hold at least one token, got none", param=param)
        room = self.length - len(tokens)
        if room < (asked != 0):
            raise self._too_long(param, f"{len(tokens)}")
        if asked is None:
            return Prompt(tokens, min(room, self._max_tokens or default))
        if asked > room:
            raise Refused(
                f"max_tokens must be at most {room}, the number that the {len(tokens)} tokens of {param} leave of "
                f"{self.length} (--length), got {asked}",
                param="max_tokens",
                code="context_length_exceeded",
            )
        return Prompt(tokens, asked)

    def _text(self, param: str, text: str, special: bool = True) -> list[int]:
        self._check_text(param, len(text))
        return self._tokenizer(text, add_special_tokens=special)["input_ids"]

    def _known(self, param: str, tokens: list[int]) -> list[int]:
        known = len(self._tokenizer)
        unknown = next((token for token in tokens if not 0 <= token < known), None)
        if unknown is not None:
            raise Refused(f"{param} must hold tokens from 0 to {known - 1}, got {unknown}", param=param)
        return tokens

    def _chat(self, body: Chat) -> list[int]:
        if not self._tokenizer.chat_template:
            raise Refused(
                "messages must go to a model with a chat template, got one without: ask /v1/completions, or give the "
                "base one",
                param="messages",
            )
        self._check_text("messages", sum(len(message.content) for message in body.messages))
        messages = [
            {"role": each.role.replace("developer", "system"), "content": each.content} for each in body.messages
        ]
        begins = not body.continue_final_message if body.add_generation_prompt is None else body.add_generation_prompt
        try:
            return self._tokenizer.apply_chat_template(
                messages, add_generation_prompt=begins, continue_final_message=body.continue_final_message
            )["input_ids"]
        except (
            TemplateError,
            ValueError,
        ) as error:  # ValueError: the template does not write the last message as it is
            raise Refused(f"messages must be what the chat template takes: {error}", param="messages") from None

    def _check_text(self, param: str, characters: int) -> None:
        """Raise Refused, before the text is tokenised, if it is too long with any tokens."""
        least = characters // self._longest
        if least >= self.length:
            raise self._too_long(param, f"{least} or more")

    def _too_long(self, param: str, got: str) -> Refused:
        return Refused(
            f"{param} must be at most {self.length - 1} tokens, so that one more fits into {self.length} (--length), "
            f"got {got}",
            param=param,
            code="context_length_exceeded",
        )
