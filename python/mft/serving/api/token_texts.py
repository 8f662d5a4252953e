"""The text and the bytes of single tokens, for answers that tell log-probabilities."""

import codecs
import functools
import re
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

from mft.serving.batch.answer_text import HALF

_BYTES = {character: byte for byte, character in bytes_to_unicode().items()}  # how byte-level vocabularies write bytes


class TokenTexts:
    """Each of a tokenizer's tokens as (text, bytes), within a text and as its first one."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer, self.special = tokenizer, frozenset(tokenizer.all_special_ids)
        self.within = functools.cache(self._within)  # at most the vocabulary

    def first(self, token: int) -> tuple[str, bytes]:
        return self._read(token, self._tokenizer.decode([token]))

    def _within(self, token: int) -> tuple[str, bytes]:
        alone = self._tokenizer.decode([token])
        return self._read(token, self._tokenizer.decode([token, token])[len(alone) :])  # with the space before it

    def _read(self, token: int, text: str) -> tuple[str, bytes]:
        if HALF not in text:
            return text, text.encode()
        piece = self._tokenizer.convert_ids_to_tokens(token)
        if matched := re.fullmatch("<0x([0-9A-F]{2})>", piece):
            return text, bytes.fromhex(matched[1])
        if all(character in _BYTES for character in piece):
            return text, bytes(_BYTES[character] for character in piece)
        return text, text.encode()


class Offsets:
    """Where each token of a text begins, in characters. echo: the text that the tokens begin with, if it is known."""

    def __init__(self, texts: TokenTexts, echo: str) -> None:
        self._texts, self._echo, self._at, self._begun = texts, echo, 0, False
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token: int) -> tuple[str, int]:
        """Return the next token's text and its offset."""
        text, data = (self._texts.within if self._begun else self._texts.first)(token)
        self._begun, at = True, self._at
        # Special tokens have no text, except in a prompt that spells them.
        if token not in self._texts.special or self._echo.startswith(text, at):
            self._at += len(self._decoder.decode(data))
        return text, at
