"""Pieces of an answer add up to its text, have whole characters, and end before a stop string."""

import pytest

from mft.serving.batch.answer_text import AnswerText


def pieces(tokenizer, tokens, stops=()):
    text = AnswerText(tokenizer, stops)
    made = []
    for token in tokens:
        made.append(text.add(token))
        if text.stopped:
            return made
    return [*made, text.rest()]


@pytest.mark.parametrize("text", ["def add(a, b):\n    return a + b\n", "日本語 naïve 🙂🙂 . , ' end", " two  spaces "])
def test_pieces_are_whole_characters_and_add_up_to_the_text(tokenizer, text):
    tokens = tokenizer(text)["input_ids"]
    made = pieces(tokenizer, tokens)
    assert "".join(made) == text
    assert not any("\ufffd" in piece for piece in made)
    assert made[-1] == ""  # nothing is held back without need


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


def test_special_tokens_have_no_text(tokenizer):
    tokens = tokenizer("a<|im_end|>b")["input_ids"]
    assert "".join(pieces(tokenizer, tokens)) == "ab"
