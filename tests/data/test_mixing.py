"""Several sources with weights: which rows are trained on, and what is held out of each source."""

import re
from collections import Counter

import pytest
from chats import chats

from mft.config import DataConfig
from mft.data.mixing import mix_order, next_source
from mft.data.splits import load_splits

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def mixed(write):
    """Return a function for a configuration of chats, which are short, and texts, each of which fills a row."""

    def mixed(weights, *, counts=(40, 40), **changes):
        texts = [{"text": f"Text {i}: " + " and ".join(map(str, range(i, i + 40)))} for i in range(counts[1])]
        sources = {"chats": write(chats(counts[0]), "chats.jsonl"), "texts": write(texts, "texts.jsonl")}
        named = {name: {"source": path, "weight": w} for (name, path), w in zip(sources.items(), weights)}
        return DataConfig(sources=named, sequence_length=64, **changes)

    return mixed


def shares(dataset):
    counts = Counter(dataset["source"])
    return {name: count / len(dataset) for name, count in counts.items()}


@pytest.mark.parametrize("weights", [(3, 1), (1, 1, 1), (0.2, 0.5, 0.3), (1, 10)])
def test_shares_hold_at_any_moment_as_nearly_as_whole_rows_allow(weights):
    taken = [0] * len(weights)
    for rows in range(1, 200):
        taken[next_source(weights, taken)] += 1
        assert all(abs(had - rows * w / sum(weights)) < 1 for had, w in zip(taken, weights))


def test_the_first_source_that_is_exhausted_ends_a_mix():
    assert mix_order([9, 2], [1, 1], "first_exhausted", None) == [0, 1, 0, 1, 0]
    assert mix_order([9, 2], [1, 1], "first_exhausted", 3) == [0, 1, 0]


def test_all_exhausted_repeats_until_each_source_was_seen_whole():
    order = mix_order([6, 2], [1, 1], "all_exhausted", None)
    assert Counter(order) == {0: 6, 1: 5}
    assert Counter(mix_order([6, 2], [1, 1], "all_exhausted", 20)) == {0: 6, 1: 5}
    with pytest.raises(ValueError, match=r"must not be all_exhausted if that repeats 1001 rows 100 times, got about"):
        mix_order([1000, 1], [1e-3, 1], "all_exhausted", None)


def test_the_rows_of_a_mix_have_their_sources_shares_and_the_notes_say_so(tokenizer, mixed):
    splits = load_splits(mixed((1, 3)), tokenizer)
    found = shares(splits.train)
    assert abs(found["texts"] * len(splits.train) - 0.75 * len(splits.train)) < 1
    said = next(note for note in splits.notes if note.startswith("train: texts (weight 3) gives its"))
    assert f": {found['texts']:.1%} of all rows, " in said
    text = tokenizer.decode(next(row for row in splits.train if row["source"] == "chats")["input_ids"])
    assert "<|im_start|>user\nWhat is" in text
    assert len({str(row["input_ids"]) for row in splits.train}) == len(splits.train)


def test_a_mix_is_a_function_of_data_seed(tokenizer, mixed):
    first, again, other = (load_splits(mixed((1, 3), seed=seed), tokenizer) for seed in (0, 0, 1))
    assert first.key == again.key != other.key
    assert first.train[:] == again.train[:]
    assert sorted(map(str, first.train["input_ids"])) != sorted(map(str, other.train["input_ids"]))
    assert first.validation[:] == other.validation[:]
    chosen = [
        {row["document"] for row in load_splits(config, tokenizer).train if row["source"] == "chats"}
        for config in (mixed((1, 9), counts=(40, 30), packing=False, seed=seed) for seed in (0, 1))
    ]
    assert len(chosen[0] | chosen[1]) > len(chosen[0]) > 2


def test_each_source_holds_out_its_own_documents_under_numbers_of_their_own(tokenizer, mixed):
    splits = load_splits(mixed((1, 1)), tokenizer)
    owners = {}
    for split in (splits.validation, splits.test, splits.train):
        assert set(split["source"]) == {"chats", "texts"}
        for row in split:
            assert owners.setdefault(row["document"], row["source"]) == row["source"]
    held_out = {str(row["input_ids"]) for row in splits.validation}
    assert not held_out & {str(row["input_ids"]) for row in splits.train}
    few = load_splits(mixed((1, 3), max_eval_tokens=256, max_train_tokens=640), tokenizer)
    assert Counter(few.validation["source"]) == {"chats": 1, "texts": 3}
    assert len(few.train) == 10


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ("", "data.sources.texts: data.source '{path}' must hold examples, got an empty train split"),
        ('{"txt": "a"}\n', "data.sources.texts: {path}:1: data must have a column messages"),
        (None, "data.sources.texts: data.source must be data that exists, got '{path}'"),
    ],
)
def test_what_is_wrong_with_one_source_names_it(tokenizer, mixed, tmp_path, texts, message):
    config = mixed((1, 1))
    path = tmp_path / "texts.jsonl"
    path.unlink()
    if texts is not None:
        path.write_text(texts)
    with pytest.raises(ValueError, match=re.escape(message.format(path=path))):
        load_splits(config, tokenizer)
