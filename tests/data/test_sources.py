"""A source gives three splits: its own, or splits by content; errors for wrong names say what to do."""

import hashlib
import itertools
import json
import re
import time
from collections import Counter

import pytest
from chats import chats

from mft.config import DataConfig
from mft.data.sources import open_source
from mft.data.splits import load_splits
from mft.files import hub

pytestmark = pytest.mark.usefixtures("own_cache")


def test_a_missing_split_is_split_off_by_content_and_said(tokenizer, write):
    rows = chats(100)
    splits = load_splits(DataConfig(source=write(rows), sequence_length=64, packing=False), tokenizer)
    sizes = [len(split) for split in (splits.train, splits.validation, splits.test)]
    assert sum(sizes) == 100
    assert min(sizes) >= 3
    assert "no validation and no test split given, so about 10 % for validation and 10 % for test" in splits.notes[0]
    shuffled = load_splits(DataConfig(source=write(rows[::-1]), sequence_length=64, packing=False), tokenizer)
    assert sorted(splits.test["input_ids"]) == sorted(shuffled.test["input_ids"])


def sides(path, **shares):
    """Return {example: its split}."""
    splits = open_source(DataConfig(source=path, **shares)).load()
    return {str(row): name for name, records in splits.items() for row in records.rows}


@pytest.mark.parametrize(("count", "least"), [(60, 8), (40, 8), (39, 7), (24, 4), (10, 2)])
def test_of_few_examples_each_held_out_split_has_8_or_a_fifth(write, count, least):
    sizes = Counter(sides(write(chats(count))).values())
    assert min(sizes["validation"], sizes["test"]) >= least
    assert sizes["train"] > sizes["validation"] + sizes["test"]


def test_an_example_more_moves_few_others_to_another_split(write):
    all_of = [sides(write(chats(count))) for count in range(20, 60)]
    moved = [sum(fewer[key] != more[key] for key in fewer) for fewer, more in itertools.pairwise(all_of)]
    assert max(moved) <= 3
    assert sum(moved) / len(moved) < 1


def test_a_large_source_is_split_by_the_hash_of_each_example_alone(write):
    rows = [{"text": str(i)} for i in range(400)]
    splits = open_source(DataConfig(source=write(rows))).load()
    digits = {row["text"]: int(hashlib.sha256(json.dumps(row).encode()).hexdigest()[:8], 16) % 10 for row in rows}
    found = {split: {row["text"] for row in splits[split].rows} for split in ("validation", "test")}
    assert found["validation"] == {text for text, digit in digits.items() if digit == 8}
    assert found["test"] == {text for text, digit in digits.items() if digit == 9}


@pytest.mark.parametrize("split", ["validation", "test"])
@pytest.mark.parametrize("share", [0, 0.03, 0.4])
def test_a_share_moves_examples_between_train_and_its_split_alone(write, split, share):
    before, after = (sides(write(chats(400)), **shares) for shares in ({}, {f"{split}_share": share}))
    moved = {(before[example], after[example]) for example in before if before[example] != after[example]}
    assert moved == {("train", split) if share > 0.1 else (split, "train")}
    assert abs(Counter(after.values())[split] / 400 - share) < 0.06


def test_shares_that_would_take_everything_leave_examples_to_train_on(write):
    assert Counter(sides(write(chats(10)), validation_share=0.9, test_share=0.09).values())["train"] == 6


def test_equal_examples_fall_into_the_same_split(tokenizer, write):
    rows = [{**row, "id": copy} for row in chats(30) for copy in range(3)]
    splits = load_splits(DataConfig(source=write(rows), sequence_length=64, packing=False), tokenizer)
    held_out = {str(row["input_ids"]) for split in (splits.validation, splits.test) for row in split}
    assert held_out
    assert not held_out & {str(row["input_ids"]) for row in splits.train}


def test_three_examples_are_enough_for_three_splits(tokenizer, write):
    splits = load_splits(DataConfig(source=write(chats(3)), sequence_length=64), tokenizer)
    assert [len(split) for split in (splits.train, splits.validation, splits.test)] == [1, 1, 1]


def test_a_directory_gives_its_own_splits(tokenizer, write, tmp_path, monkeypatch):
    write(chats(20), "set/train.jsonl")
    write(chats(3), "set/test.jsonl")
    write(chats(4), "set/validation.jsonl")
    config = {"source": str(tmp_path / "set"), "sequence_length": 64, "packing": False}
    splits = load_splits(DataConfig(**config), tokenizer)
    assert [len(split) for split in (splits.train, splits.validation, splits.test)] == [20, 4, 3]
    splits = load_splits(DataConfig(**config, split="train[:50%]", validation_split="test"), tokenizer)
    assert [len(splits.validation), len(splits.train) + len(splits.test)] == [3, 10]
    with pytest.raises(ValueError, match=r"data.split must be one of test, .*, got 'trian'; did you mean train\?"):
        load_splits(DataConfig(**config, split="trian"), tokenizer)
    monkeypatch.chdir(tmp_path / "set")
    for here in (".", "./", "../set/."):
        splits = load_splits(DataConfig(**config | {"source": here}), tokenizer)
        assert [len(split) for split in (splits.train, splits.validation, splits.test)] == [20, 4, 3]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"source": "stdlb"},
            "data.source 'stdlb' is neither stdlib, docstrings, headers, problems, nor a file or directory here",
        ),
        ({"source": "stdlb"}, "check the name and the network, or give a local file; did you mean stdlib?"),
        ({"source": "someone/some-data"}, "the hub cannot be reached"),
        ({"source": "./nowhere.jsonl"}, "data.source must be data that exists, got './nowhere.jsonl': no such file"),
        ({"source": "no data"}, "a .json, .jsonl, .parquet or .csv file, a directory or a hub id, got 'no data'"),
        ({"split": "test"}, "data.split must be left out for this source, got 'test': the stdlib corpus is split by"),
        (
            {"source": "headers", "test_share": 0},
            "data.test_share must be left out for this source, got 0.0: the corpus",
        ),
        ({"subset": "main"}, "data.subset must be pretrain, finetune or null for the stdlib corpus, got 'main'"),
    ],
)
def test_a_wrong_source_says_what_it_is_and_what_to_do(tokenizer, config, message, monkeypatch):
    hub.hub_is_reachable.cache_clear()
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    start = time.monotonic()
    with pytest.raises(ValueError, match=re.escape(message)):
        load_splits(DataConfig(**config), tokenizer)
    hub.hub_is_reachable.cache_clear()
    assert time.monotonic() - start < 10


def test_a_file_of_one_split_takes_no_split_names(tokenizer, write):
    with pytest.raises(ValueError, match="data.validation_split must be left out for this source, got 'dev'"):
        load_splits(DataConfig(source=write(chats()), validation_split="dev"), tokenizer)
