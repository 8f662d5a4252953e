"""The small Llama and its questions, made once per file."""

import pytest
from half_right import make_model, make_rows, make_tokenizer, questions


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def base(tokenizer):
    return make_model(tokenizer)


@pytest.fixture(scope="module")
def rows(tokenizer):
    return make_rows(questions(24), tokenizer)
