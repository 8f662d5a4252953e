"""The system prompt of a source is the one with which all its training chats begin, in any form."""

import pytest
from chats import chat

from mft.config import DataConfig, SourceConfig
from mft.data.sources import open_source
from mft.data.system_prompt import shared_system

pytestmark = pytest.mark.usefixtures("own_cache")
SORT, SHORT = "Sort tickets.", "Answer briefly."


def asked(*systems):
    """Return 20 chats with each system prompt."""
    return [chat(f"Ticket {i}", "billing", system=system) for system in systems for i in range(20)]


def spoken(row):
    """Return a chat in ShareGPT's form."""
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    return {"conversations": [{"from": names[turn["role"]], "value": turn["content"]} for turn in row["messages"]]}


def pair(row):
    *prompt, answer = row["messages"]
    return {"prompt": prompt, "chosen": [answer], "rejected": [answer | {"content": "bug"}]}


@pytest.mark.parametrize(
    ("rows", "found"),
    [
        (asked(SORT), SORT),
        (asked(SORT, SHORT), None),
        (asked(SORT, None), None),
        (asked(None), None),
        ([*asked(SORT), {"messages": [{"role": "user", "content": "never answered"}]}], SORT),
        (list(map(spoken, asked(SORT))), SORT),
        (list(map(pair, asked(SORT))), SORT),
        ([{"prompt": f"Ticket {i}:", "completion": " bug"} for i in range(20)], None),
        ([{"text": f"Ticket {i}"} for i in range(20)], None),
    ],
    ids=["one", "two", "some", "none", "unanswered", "sharegpt", "pairs", "completions", "texts"],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_a_source_has_a_system_prompt_if_all_chats_share_it(write, rows, found, streaming):
    assert shared_system(open_source(DataConfig(write(rows), streaming=streaming))) == found


@pytest.mark.parametrize(("second", "found"), [(SORT, SORT), (SHORT, None), (None, None)])
def test_the_sources_of_a_mix_must_share_it(write, second, found):
    files = {"one": write(asked(SORT), "one.jsonl"), "other": write(asked(second), "other.jsonl")}
    config = DataConfig(sources={name: SourceConfig(file) for name, file in files.items()})
    assert shared_system(open_source(config)) == found
