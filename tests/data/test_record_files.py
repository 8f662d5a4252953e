"""Files and directories of records: which are read, that nothing else is, and the errors for wrong ones."""

import csv
import gzip
import json
import re
import socket
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from chats import chats

from mft.config import DataConfig
from mft.data import record_files
from mft.data.record_files import find_splits
from mft.data.sources import open_source
from mft.data.splits import load_splits

pytestmark = pytest.mark.usefixtures("own_cache")


def rows_of(path, tokenizer):
    splits = load_splits(DataConfig(source=str(path), sequence_length=64), tokenizer)
    return splits.train[:], splits.test[:]


@pytest.mark.parametrize("name", ["data.parquet", "data.json"])
def test_a_file_gives_the_rows_of_the_same_jsonl(tokenizer, write, tmp_path, name):
    if name == "data.json":
        (tmp_path / name).write_text(json.dumps(chats(), indent=1))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(chats()), tmp_path / name)
    assert rows_of(tmp_path / name, tokenizer) == rows_of(write(chats()), tokenizer)


def test_csv_gives_the_rows_of_the_same_jsonl(tokenizer, write, tmp_path):
    long = "word, " * 30_000  # longer than csv's own limit
    rows = [{"prompt": f'{i} "x",\r\n\n', "completion": long if i == 4 else f"é{i}"} for i in range(20)]
    with (tmp_path / "data.csv").open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, ["id", "completion", "prompt"])
        writer.writeheader()
        writer.writerows({"id": number, **row} for number, row in enumerate(rows))
    assert rows_of(tmp_path / "data.csv", tokenizer) == rows_of(write(rows), tokenizer)


def test_zipped_lines_give_the_rows_of_the_same_jsonl_and_broken_ones_are_told(tokenizer, write, tmp_path):
    path = tmp_path / "data.jsonl.gz"
    path.write_bytes(gzip.compress(Path(write(chats())).read_bytes()))
    assert rows_of(path, tokenizer) == rows_of(write(chats()), tokenizer)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"data.jsonl.gz must be a gzip file, and cannot be read as one"):
        rows_of(path, tokenizer)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a.jsonl", "deep/b.jsonl"], {"train": ["a.jsonl", "deep/b.jsonl"]}),
        (["train.jsonl", "dev.jsonl", "x.jsonl"], {"train": ["train.jsonl"], "validation": ["dev.jsonl"]}),
        (
            ["train/0.jsonl", "train/1.jsonl", "Test/0.jsonl"],
            {"train": ["train/0.jsonl", "train/1.jsonl"], "test": ["Test/0.jsonl"]},
        ),
        (["tests/train_1.jsonl", "my-eval.jsonl"], {"train": ["tests/train_1.jsonl"], "test": ["my-eval.jsonl"]}),
        (
            ["data/train_sft-00000-of-00001.jsonl", "data/x.jsonl"],
            {"train_sft": ["data/train_sft-00000-of-00001.jsonl"]},
        ),
        (["train.csv", "test.csv"], {"train": ["train.csv"], "test": ["test.csv"]}),
        (["train.jsonl.gz", "dev.jsonl"], {"train": ["train.jsonl.gz"], "validation": ["dev.jsonl"]}),
        (["train.jsonl", "train.csv"], {"train": ["train.jsonl"]}),
        (["contest.jsonl", ".hidden/train.jsonl", "latest.jsonl"], {"train": ["contest.jsonl", "latest.jsonl"]}),
    ],
)
def test_names_of_files_say_their_splits(tmp_path, names, expected):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    splits, left_out = find_splits(tmp_path)
    found = {split: [str(path.relative_to(tmp_path)) for path in paths] for split, paths in splits.items()}
    assert found == expected
    assert [path.name for path in left_out] == [
        name.rpartition("/")[2] for name in names if name in ("x.jsonl", "data/x.jsonl")
    ]


@pytest.fixture
def no_network(monkeypatch):
    """Make every name look-up and connection fail, while the hub's client believes that it is online."""

    def refuse(*arguments, **options):
        raise AssertionError(f"asked the network for {arguments}")

    for name in ("getaddrinfo", "gethostbyname", "create_connection"):
        monkeypatch.setattr(socket, name, refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)


CARD = """---
configs:
- config_name: default
  data_files:
  - {{split: train, path: "{}"}}
---
"""


@pytest.mark.parametrize(
    "place", ["http://example.com/x.jsonl", "hf://datasets/a/b/x.jsonl", "{}/secret.jsonl", "../*"]
)
def test_a_directorys_card_names_nothing_that_is_read(tokenizer, write, tmp_path, no_network, place):
    write([{"text": "the owner's own"}] * 4, "secret.jsonl")
    write([{"text": f"a stranger's {i}"} for i in range(9)], "set/data.jsonl")
    (tmp_path / "set" / "README.md").write_text(CARD.format(place.format(tmp_path)))
    (tmp_path / "set" / "loader.py").write_text("raise SystemExit('a script ran')")
    source = open_source(DataConfig(source=str(tmp_path / "set")))
    texts = [row["text"] for records in source.load().values() for row in records.rows]
    assert sorted(texts) == [f"a stranger's {i}" for i in range(9)]


def test_what_save_to_disk_wrote_is_read_from_that_directory_alone(tokenizer, write, tmp_path, no_network):
    rows = datasets.Dataset.from_list(chats(20))
    rows.save_to_disk(tmp_path / "one", num_shards=2)
    datasets.DatasetDict({"train": rows, "test": rows.select(range(3))}).save_to_disk(tmp_path / "several")
    config = {"sequence_length": 64, "packing": False}
    one = load_splits(DataConfig(source=str(tmp_path / "one"), **config), tokenizer)
    assert len(one.train) + len(one.validation) + len(one.test) == 20
    several = load_splits(DataConfig(source=str(tmp_path / "several"), **config), tokenizer)
    assert len(several.test) == 3
    shard = next((tmp_path / "several" / "test").glob("*.arrow"))
    for outside in (str(shard), f"../several/test/{shard.name}", "..", "nowhere.arrow"):
        state = {"_data_files": [{"filename": outside}]}
        (tmp_path / "one" / "state.json").write_text(json.dumps(state))
        with pytest.raises(ValueError, match="state.json: _data_files must be the names of files or directories next"):
            open_source(DataConfig(source=str(tmp_path / "one")))


def test_a_columns_declared_pictures_are_not_fetched(tmp_path, no_network):
    pytest.importorskip("PIL")
    pictures = [{"bytes": None, "path": "http://example.com/x.png"}] * 9
    table = pyarrow.table({"text": list("abcdefghi"), "seen": pictures})
    features = datasets.Features({"text": datasets.Value("string"), "seen": datasets.Image()})
    pyarrow.parquet.write_table(table.cast(features.arrow_schema), tmp_path / "data.parquet")
    source = open_source(DataConfig(source=str(tmp_path / "data.parquet")))
    assert len([row for records in source.load().values() for row in records.rows]) == 9


def test_a_file_without_line_ends_is_not_read_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(record_files, "LONGEST_LINE", 100)
    (tmp_path / "data.jsonl").write_text('{"text": "' + "a" * 87 + '"}\n' + '{"text": "' + "a" * 90 + '"}\n')
    with pytest.raises(ValueError, match=r"data.jsonl:2: a line must have at most 100 bytes, got more"):
        open_source(DataConfig(source=str(tmp_path / "data.jsonl"))).load()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl",
            b'\xef\xbb\xbf{"text": "a"}\n{"text": "\xe9"}\n',
            "a.jsonl:2: must be UTF-8 text, got 0xe9 at byte 27 of the file: convert it, if it is LATIN1 by",
        ),
        ("a.jsonl", b"\xef\xbb\xbf\xe9", "a.jsonl:1: must be UTF-8 text, got 0xe9 at byte 3 of the file"),
        ("a.jsonl", '{"text": "a"}'.encode("utf-16"), "got 0xff at byte 0 of the file: convert it, if it is UTF-16"),
        ("a.jsonl", b'{"a": ' + b"1" * 5000 + b"}", "a.jsonl:1: broken JSON, must be one object per line: Exceeds the"),
        ("a.parquet", b"PAR1", "a.parquet must be a parquet file, and cannot be read as one"),
        ("a.csv", b'text,id\na,1\n\n"b\nc",2\nd\n', "a.csv:6: must have 2 values, as many as the header"),
        ("a.csv", b"text\na\n\xe9\n", "a.csv:3: must be UTF-8 text, got 0xe9 at byte 7 of the file: convert it"),
        ("a.csv", b"text,text\na,b\n", "a.csv:1: the header must name each column once, got text,text"),
        ("a.csv", b"prompt;completion\na;b\n", "a.csv:2: data must have a column messages"),
        ("a.csv", b"", "must hold examples, got an empty train split"),
        ("b/a.txt", b"text", "data.source must be a directory with .jsonl, .parquet or .csv files, got "),
        ("b/train.jsonl", b'{"text": \n', "b/train.jsonl:1: broken JSON, must be one object per line"),
        ("c/train.jsonl", b"", "must hold examples, got an empty train split"),
        ("d/train-test.jsonl", b"", "have files of one split each, got train-test.jsonl, which names train and test"),
    ],
)
def test_wrong_files_say_where_and_what(tokenizer, tmp_path, name, content, message):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    source = path.parent if "/" in name else path
    with pytest.raises(ValueError, match=re.escape(message)):
        load_splits(DataConfig(source=str(source)), tokenizer)
