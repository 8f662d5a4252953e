"""Data that need not fit in memory: they are read as rows are requested, and continue from a small state."""

import csv
import gzip
import itertools
import json
import random
import re
import tracemalloc
from pathlib import Path

import datasets
import pytest
from chats import chats
from tiny import make_words

from mft.config import DataConfig
from mft.data.record_files import read_files
from mft.data.record_streams import stream_files, stream_hub, stream_records
from mft.data.splits import load_splits
from mft.data.streams import StreamedRows

pytestmark = pytest.mark.usefixtures("own_cache")
LENGTH = 16


@pytest.fixture(scope="module")
def words():
    return make_words(1000)


def texts(count, longest=12):
    draw = random.Random(0)
    return [{"text": f"{1 + i} " * draw.randrange(2, longest)} for i in range(count)]


def sums(count):
    return [{"prompt": f"{1 + i} {1 + i}", "completion": f" {2 + 2 * i}"} for i in range(count)]


def streamed(source, **changes):
    where = {"sources": source} if isinstance(source, dict) else {"source": source}
    settings = {"sequence_length": LENGTH, "streaming": True, "buffer_size": 8, "max_eval_tokens": 3 * LENGTH}
    return DataConfig(**where, **settings | changes)


def mix(write):
    files = {"texts": write(texts(70), "texts.jsonl"), "sums": write(sums(40), "sums.jsonl")}
    return {name: {"source": path, "weight": 3 if name == "texts" else 1} for name, path in files.items()}


def taken(rows, count):
    return [
        (number, row.input_ids.tolist(), row.labels.tolist(), row.document, row.starts, row.source)
        for number, row in itertools.islice(rows, count)
    ]


# ---------------------------------------------------------------------------------------------- records


def files(rows, directory):
    """Write the same records in every type of file, in two files each."""
    half = len(rows) // 2
    found = {}
    for name, ending in {**{kind: kind for kind in ("jsonl", "csv", "parquet", "json")}, "zipped": "jsonl.gz"}.items():
        found[name] = [directory / f"{name}-{number}.{ending}" for number in range(2)]
        for path, part in zip(found[name], (rows[:half], rows[half:])):
            if name == "parquet":
                datasets.Dataset.from_list(part).to_parquet(path, batch_size=4)
                continue
            with gzip.open(path, "wt") if name == "zipped" else path.open("w", newline="") as file:
                if name == "csv":
                    writer = csv.DictWriter(file, list(part[0]))
                    writer.writeheader()
                    writer.writerows(part)
                elif name == "json":
                    json.dump(part, file)
                else:
                    file.writelines(json.dumps(row) + "\n\n" for row in part)
    return found


@pytest.mark.parametrize("kind", ["jsonl", "zipped", "csv", "json", "parquet", "saved", "hub", "memory"])
def test_records_go_on_from_any_position_that_json_has_kept(tmp_path, kind):
    rows = [{"text": f"{i}, é\nand\u2028more", "id": str(i)} for i in range(11)]
    found = files(rows, tmp_path)
    if kind == "hub":
        names = [str(path) for path in found["jsonl"]]
        stream = stream_hub(datasets.load_dataset("json", data_files=names, split="train", streaming=True), "hub")
    elif kind == "saved":
        datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved", num_shards=2)
        stream = stream_files(sorted((tmp_path / "saved").glob("*.arrow")))
    elif kind == "memory":
        stream = stream_records(read_files(found["jsonl"]))
    else:
        stream = stream_files(found[kind])
    everything = list(stream(None))
    assert [row["text"] for row, _ in everything] == [row["text"] for row in rows]
    for count in range(len(rows) + 1):
        reader = stream(None)
        assert list(itertools.islice(reader, count)) == everything[:count]
        assert not count or set(reader.columns) == {"text", "id"}
        position = json.loads(json.dumps(reader.position))
        assert list(stream(position)) == everything[count:]


# ---------------------------------------------------------------------------------------------- rows


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("form", [texts, sums])
def test_a_stream_gives_every_document_once_a_pass_in_an_order_of_its_own(words, write, form, packing):
    rows = load_splits(streamed(write(form(60)), packing=packing), words).train
    passes = [[], [], []]
    while not passes[2]:
        _, row = next(rows)
        passes[rows.state()["sources"][""]["passes"]].append(row)
    first, second = [[int(t) for row in some for t in row.input_ids if t] for some in passes[:2]]
    wanted = [int(t) for row in form(60)[6:] for text in row.values() for t in text.split()]
    assert sorted(first) == sorted(second) == sorted(wanted)
    assert wanted != first != second
    assert len({row.document for row in passes[0]} - set(range(6, 14))) > 5  # windows come one after another
    assert all(row.document < 14 for row in passes[0][:2])


def test_the_first_documents_are_held_out_wherever_they_stand(words, write):
    rows = texts(60)
    splits = load_splits(streamed(write([*rows, rows[1], rows[4]])), words)
    assert "validation: documents 0 to 2 of the stream, which are not trained on" in splits.notes
    assert "test: documents 3 to 5 of the stream, which are not trained on" in splits.notes
    assert [row["input_ids"][0] for row in splits.validation] == [1, 2, 3]
    assert [row["input_ids"][0] for row in splits.test] == [4, 5, 6]
    trained = {int(t) for _, row in itertools.islice(splits.train, 200) for t in row.input_ids}
    assert trained == {0, *range(7, 61)}


def test_a_directory_holds_out_its_own_splits(words, write, tmp_path):
    for name, start in {"train": 0, "validation": 30, "test": 40}.items():
        write(texts(60)[start : start + 10], f"set/{name}.jsonl")
    splits = load_splits(streamed(str(tmp_path / "set")), words)
    assert [row["input_ids"][0] for row in splits.validation] == [31, 32, 33]
    assert {int(t) for _, row in itertools.islice(splits.train, 50) for t in row.input_ids} == set(range(11))


def test_a_data_set_of_the_hub_is_streamed_with_its_own_validation(words, write, monkeypatch):
    """The files that load_dataset would fetch are local."""
    names = {"train": write(texts(60), "a.jsonl"), "validation": write(texts(70)[60:], "b.jsonl")}
    load, asked = datasets.load_dataset, []

    def load_dataset(*named, streaming):
        asked.append((*named, streaming))
        return load("json", data_files=names, streaming=streaming)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr("mft.data.sources.hub_is_reachable", lambda: True)
    config = streamed("someone/texts", subset="large")
    splits = load_splits(config, words)
    assert asked == [("someone/texts", "large", True)]
    assert [row["input_ids"][0] for row in splits.validation] == [61, 62, 63]
    assert [row["input_ids"][0] for row in splits.test] == [1, 2, 3]
    straight = taken(splits.train, 60)
    rows = load_splits(config, words).train
    taken(rows, 25)
    resumed = load_splits(config, words).train
    resumed.restore(json.loads(json.dumps(rows.state())))
    assert taken(resumed, 35) == straight[25:]


@pytest.mark.parametrize("stopping", ["first_exhausted", "all_exhausted"])
@pytest.mark.parametrize("packing", [True, False])
def test_a_stream_goes_on_bit_for_bit_from_a_state_that_json_has_kept(words, write, stopping, packing):
    sources = mix(write)
    config = streamed(sources, stopping_strategy=stopping, packing=packing)
    straight = taken(load_splits(config, words).train, 200)
    for stop in (1, 37, 110):
        rows = load_splits(config, words).train
        assert taken(rows, stop) == straight[:stop]
        state = json.loads(json.dumps(rows.state()))
        resumed = load_splits(config, words).train
        resumed.peek(1)
        resumed.restore(state)
        assert taken(resumed, 200 - stop) == straight[stop:]
    assert resumed.describe()[-2:] == [line for line in resumed.describe() if "(weight" in line]
    other = load_splits(streamed(sources, seed=1), words).train
    assert taken(other, 40) != straight[:40]


def test_the_shares_of_a_streamed_mix_hold_and_are_told(words, write):
    sources = mix(write)
    rows = load_splits(streamed(sources, stopping_strategy="all_exhausted"), words).train
    count = 0
    for number, row in itertools.islice(rows, 200):
        count += row.source == "texts"
        assert abs(count - 0.75 * (number + 1)) < 1
    said = "\n".join(rows.describe())
    assert "train: texts (weight 3) gives 150 rows: 75.0% of all rows, " in said
    assert re.search(r"^sums: train: the data ended \d+ times, and was read again", said, re.MULTILINE)


def test_first_exhausted_begins_all_sources_again_where_one_ends(words, write):
    sources = {n: {"source": write(texts(count), f"{n}.jsonl")} for n, count in (("long", 300), ("short", 40))}
    for strategy, whole in {"first_exhausted": False, "all_exhausted": True}.items():
        rows = load_splits(streamed(sources, stopping_strategy=strategy), words).train
        found = {int(t) for _, row in itertools.islice(rows, 500) if row.source == "long" for t in row.input_ids}
        assert (max(found) == 300) == whole


def test_other_data_at_the_place_of_a_state_are_refused(words, write):
    path = write(texts(60))
    rows = load_splits(streamed(path), words).train
    taken(rows, 9)
    state = rows.state()
    first = state["sources"][""]["document"]
    Path(path).write_text(Path(path).read_text().replace(f'"{first + 2} ', f'"{first + 3} '))
    changed = load_splits(streamed(path), words).train
    with pytest.raises(ValueError, match=f"must be those that the run began with, got other documents from {first} on"):
        changed.restore(state)


def test_memory_does_not_grow_with_the_data(words, tmp_path):
    peaks = []
    for count in (100, 500):
        path = tmp_path / f"{count}.jsonl"
        rows = ({"text": " ".join(map(str, range(1 + i % 800, 101 + i % 800)))} for i in range(count))
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        rows = load_splits(streamed(str(path), buffer_size=16), words).train
        assert isinstance(rows, StreamedRows)
        tracemalloc.start()
        for _ in itertools.islice(rows, count * 4):
            pass
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]
    assert peaks[1] < path.stat().st_size


def test_a_window_of_long_documents_ends_early(words, write, monkeypatch):
    monkeypatch.setattr("mft.data.streams._LONGEST_WINDOW", 100)
    rows = load_splits(streamed(write([*texts(6), {"text": "777 " * 60}, *texts(40)])), words).train
    assert {int(token) for _, row in itertools.islice(rows, 3) for token in row.input_ids} <= {0, 777}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "must hold examples, got none"),
        (texts(6), "must leave rows to train on, got none: give more documents, or lower data.max_eval"),
        ([{"text": str(i + 1)} for i in range(6)] + [{"text": " "}] * 3, "must leave rows to train on, got none"),
        ([{"text": ""}] * 9, "must leave rows to score in every split, got none for validation"),
        (chats(9), "messages need a tokenizer with a chat template, got one without: set model.chat_template"),
        ([*texts(20), {"txt": "1"}], "data.jsonl:21: text must be a string, got null"),
    ],
)
def test_a_stream_that_has_nothing_to_train_on_says_so(words, write, rows, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        for _ in itertools.islice(load_splits(streamed(write(rows)), words).train, 50):
            pass


def test_examples_that_are_cut_or_empty_are_counted_window_after_window(words, write):
    odd = [{"prompt": "1", "completion": " 2" * 40}, {"prompt": "1", "completion": ""}]
    rows = load_splits(streamed(write([*sums(6), *odd, *sums(14)[6:]])), words).train
    while not rows.state()["sources"][""]["window"]:
        next(rows)
    assert rows.describe() == [
        f"train: 1 examples were longer than sequence_length = {LENGTH} and were cut there",
        "train: 1 examples had nothing to score and were left out",
    ]
