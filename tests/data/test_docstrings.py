"""Chats from docstrings, and the shares of files that stdlib and docstrings hold out."""

import re

import pytest

from mft.config import DataConfig
from mft.data.docstrings import docstring_chats
from mft.data.sources import open_source

LONG = "Return what this function was called with, unchanged."
FILE = f'''
def public(x, *, y: int = 2):
    """{LONG}

    A second line.
        An indented one.
    """

def _private():
    """{LONG} It is private."""

def short():
    """Return nothing."""

class Outer:
    """A class, with a docstring that no chat is made of."""
    class Inner:
        async def method(self):
            """{LONG} It is a method."""
'''


def texts(chats):
    """Return (user's words, assistant's words) of each chat."""
    for chat in chats:
        assert [message["role"] for message in chat["messages"]] == ["user", "assistant"]
    return [tuple(message["content"] for message in chat["messages"]) for chat in chats]


def test_the_user_names_a_public_function_and_the_answer_is_its_docstring():
    chats = docstring_chats({"json/__init__.py": FILE, "empty.py": "x = 1", "python2.py": "print 1"})
    assert list(chats) == ["json/__init__.py"]
    assert texts(chats["json/__init__.py"]) == [
        (
            "Write the docstring of `json.public(x, *, y: int=2)` in Python's standard library.",
            f"{LONG}\n\nA second line.\n    An indented one.",
        ),
        (
            "Write the docstring of `json.Outer.Inner.method(self)` in Python's standard library.",
            f"{LONG} It is a method.",
        ),
    ]


def test_a_docstring_that_an_earlier_file_has_gives_no_chat():
    again = f'def other():\n    """{LONG} It is a method."""\n\ndef own():\n    """{LONG} It is its own."""\n'
    chats = docstring_chats({"a/b.py": FILE, "c.py": again})
    assert texts(chats["c.py"]) == [
        ("Write the docstring of `c.own()` in Python's standard library.", f"{LONG} It is its own.")
    ]


@pytest.fixture
def library(monkeypatch):
    """Put a small library in the place of Python's: 600 files, each second one with two documented functions."""
    functions = '\n\ndef {0}{1}(x):\n    """' + LONG + ' File {1}, {0}."""\n'
    files = {
        f"m{i:03}.py": f"# file {i}" + (functions.format("f", i) + functions.format("g", i) if i % 2 else "")
        for i in range(600)
    }
    monkeypatch.setattr("mft.data.sources.stdlib_files", lambda: files)
    return files


def files_of(config):
    """Return the names of each split's files: for texts from their content, for chats from their question."""
    found = {}
    for split, records in open_source(config).load().items():
        said = [row["text"] if "text" in row else row["messages"][0]["content"] for row in records.rows]
        found[split] = {int(re.search(r"# file (\d+)|`m(\d+)\.", text)[0].strip("`.m# file")) for text in said}
        assert len(set(records.numbers)) == len(found[split])  # a file is one document
    return found


@pytest.mark.parametrize("shares", [{}, {"validation_share": 0.15, "test_share": 0.5}])
def test_a_file_lies_in_the_same_split_as_text_and_as_chats(library, shares):
    text, chats = (files_of(DataConfig(source=source, **shares)) for source in ("stdlib", "docstrings"))
    documented = {i for i in range(600) if i % 2}
    assert {split: found & documented for split, found in text.items()} == chats
    records = open_source(DataConfig(source="docstrings", **shares)).load()
    assert sum(len(each.rows) for each in records.values()) == 2 * len(documented)
    assert records["test"].place(0) == f"m{min(chats['test']):03}.py"


def test_shares_say_how_many_files_are_held_out_and_a_larger_share_keeps_those_of_a_smaller_one(library):
    usual = files_of(DataConfig())
    many = files_of(DataConfig(test_share=0.5))
    assert many["validation"] == usual["validation"]
    assert usual["test"] < many["test"]
    assert 240 < len(many["test"]) < 360  # half of 600; a standard deviation is 12
    assert many["train"] == usual["train"] - many["test"]


def test_too_few_files_in_a_split_name_the_shares(library):
    message = r"at least 20 files per split, got .* for test with data.validation_share 0.1 and data.test_share 0.01"
    with pytest.raises(ValueError, match=message):
        open_source(DataConfig(test_share=0.01))


def test_the_librarys_own_chats_are_the_same_again(tokenizer):
    config = DataConfig(source="docstrings", test_share=0.5)
    first, second = open_source(config), open_source(config)
    assert first.fingerprint == second.fingerprint
    for split, records in first.load().items():
        assert records.rows == second.load()[split].rows
    answers = {split: {chat[1] for chat in texts(records.rows)} for split, records in first.load().items()}
    assert min(map(len, answers.values())) > 200
    assert not answers["train"] & answers["test"]
