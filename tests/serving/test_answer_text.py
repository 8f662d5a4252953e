"""Pieces of an answer add up to its text, have whole characters, and end before a stop string."""

from types import SimpleNamespace

import pytest

from mft.serving.batch.answer_text import AnswerText


def pieces(tokenizer, tokens, stops=(), **options):
    text = AnswerText(tokenizer, stops, **options)
    made = []
    for token in tokens:
        made.append(text.add(token))
        if text.stopped:
            return made
    return [*made, text.rest()]


LONG = "日本語 naïve 🙂🙂 is long. " * 20  # so that not all of its tokens are kept


@pytest.mark.parametrize("text", ["def add(a, b):\n    return a + b\n", "日本語 🙂🙂 . , ' end", " two  spaces ", LONG])
def test_pieces_are_whole_characters_and_add_up_to_the_text(tokenizer, text):
    tokens = tokenizer(text)["input_ids"]
    made = pieces(tokenizer, tokens)
    assert "".join(made) == text
    assert not any("\ufffd" in piece for piece in made)
    assert made[-1] == ""  # nothing is held back without need
    assert pieces(tokenizer, tokens, at_once=True) == [""] * len(tokens) + [text]


def test_bytes_that_are_no_character_come_at_the_end(tokenizer):
    tokens = tokenizer("🙂")["input_ids"][:-1]
    made = pieces(tokenizer, tokens)
    assert made[:-1] == [""] * len(tokens)
    assert "".join(made) == tokenizer.decode(tokens)


@pytest.mark.parametrize(
    ("stops", "expected"),
    [
        (["\n    ret"], "def add(a, b):"),
        (["b):", "a, b"], "def add("),
        (["ddd", "turn a + bb"], "def add(a, b):\n    return a + b\n"),
        (["def"], ""),
    ],
)
def test_a_stop_string_across_tokens_ends_the_text_and_its_beginning_is_held_back(tokenizer, stops, expected):
    tokens = tokenizer("def add(a, b):\n    return a + b\n")["input_ids"]
    assert "".join(pieces(tokenizer, tokens, stops)) == expected
    assert "".join(pieces(tokenizer, tokenizer(LONG)["input_ids"] + tokens, stops)) == LONG + expected
    at_once = pieces(tokenizer, tokens, stops, at_once=True)
    assert (at_once[:-1], at_once[-1]) == ([""] * (len(at_once) - 1), expected)


def test_special_tokens_have_no_text(tokenizer):
    tokens = tokenizer("a<|im_end|>b")["input_ids"]
    assert "".join(pieces(tokenizer, tokens)) == "ab"


def test_a_tokenizer_whose_bytes_are_read_together_gives_whole_characters():
    def decode(tokens, **_):  # as Llama-2's does: bytes that end within a character spoil those before
        try:
            return bytes(tokens).decode()
        except UnicodeDecodeError:
            return "\ufffd" * len(tokens)

    assert "".join(pieces(SimpleNamespace(decode=decode), "ü".encode() * 60)) == "ü" * 60  # 5 tokens begin within one
