"""Small files that decompress to gigabytes are refused before that. Ordinary files of any size are read."""

import functools
import gzip
import json
import struct

import pyarrow
import pyarrow.parquet
import pytest
from limits import peak_of
from tiny_parquet import DATA, Page, dictionary, nulls, parquet, same

from mft.data import growth
from mft.data.record_files import read_files
from mft.data.record_streams import stream_files

BOUND = 2**25  # bytes that any file may take here, instead of growth.LEAST
MOST = 15 * BOUND  # memory; csv takes four bytes for each of 64 MiB of a record
READ = """
from pathlib import Path
from mft.data import growth
from mft.data.record_files import read_files
from mft.data.record_streams import stream_files
import pyarrow.parquet

growth.LEAST = {bound}

def stream(path):
    for row in stream_files([path])(None):
        pass
"""
EACH = """
for path in sorted(Path({0!r}).iterdir()):
    try:
        {call}
        print(path.name, "read")
    except ValueError as error:
        print(path.name, error)
"""


@functools.cache
def hollow():
    """Return {file: its bytes}, made on demand: this takes a second, and every process collects this file."""
    return {
        "nulls.parquet": parquet(2**29, nulls(2**29)),
        "same.parquet": parquet(10**6, dictionary(b"ab" * 100), same(10**6)),
        "dictionary.parquet": parquet(3, dictionary(b"a" * 300_000_000), same(3), unpacked=100),
        "long.parquet": parquet(1000, dictionary(b"a" * 300_000), same(1000)),
        "rows.jsonl.gz": gzip.compress((b'{"text": "a"}\n' * 1000) * 1000),
        "brackets.jsonl.gz": gzip.compress(b'{"messages": [' + b"{}," * 4_000_000 + b"{}]}\n"),
        "record.csv.gz": gzip.compress(b'text,more\n"' + (b"a" * 1_000_000 + b"\n") * 80),
        "line.jsonl.gz": gzip.compress(b"a" * 80_000_000),
    }


def messages_of(directory, call, *, without=()):
    """Return {file: what the call said about it}, after checking that the call took little memory and time."""
    for file in hollow().keys() - without:
        (directory / file).write_bytes(hollow()[file])
    taken = peak_of(READ.format(bound=BOUND), EACH.format(str(directory), call=call))
    assert taken.bytes < MOST
    assert taken.seconds < 30
    return dict(line.split(" ", 1) for line in taken.said.splitlines()[:-1])


@pytest.mark.slow
def test_small_files_that_stand_for_gigabytes_are_refused_before_these_are_taken(tmp_path):
    said = messages_of(tmp_path, "read_files([path])")
    assert said.keys() == hollow().keys()
    for file, words in said.items():
        assert str(tmp_path / file) in words
        assert "must " in words


@pytest.mark.slow
def test_a_stream_refuses_what_it_would_hold_at_once_and_reads_the_rest(tmp_path):
    said = messages_of(tmp_path, "stream(path)", without={"same.parquet", "rows.jsonl.gz"})  # a million rows take long
    assert [file for file, words in said.items() if words == "read"] == ["long.parquet"]


def test_files_that_grow_as_ordinary_ones_do_are_read_however_large(tmp_path, monkeypatch):
    """A bound of a few bytes instead of 256 MiB acts as if each file were a thousand times as large."""
    monkeypatch.setattr(growth, "LEAST", 1)
    system = "You answer in one word. " * 80  # the same in each row
    chats = [[{"role": "system", "content": system}, {"role": "user", "content": str(i)}] for i in range(20_000)]
    pyarrow.parquet.write_table(pyarrow.table({"messages": chats}), tmp_path / "chats.parquet", compression="zstd")
    texts = [json.dumps({"text": f"{i} + {i} = {2 * i}"}) + "\n" for i in range(20_000)]
    (tmp_path / "short.jsonl.gz").write_bytes(gzip.compress("".join(texts).encode()))
    for name in ("chats.parquet", "short.jsonl.gz"):
        assert len(read_files([tmp_path / name]).rows) == 20_000
        assert sum(1 for _ in stream_files([tmp_path / name])(None)) == 20_000


def test_rows_read_in_pieces_are_those_of_the_whole_table(tmp_path):
    table = pyarrow.table({"text": [str(i) for i in range(5000)]})
    pyarrow.parquet.write_table(table, tmp_path / "data.parquet", row_group_size=1800)
    records = read_files([tmp_path / "data.parquet"])
    assert records.rows.data.table.equals(table)
    pyarrow.parquet.write_table(table.slice(0, 0), tmp_path / "none.parquet")
    assert (len(read_files([tmp_path / "none.parquet"]).rows), records.columns) == (0, ["text"])


@pytest.mark.parametrize(
    "header",
    [b"\x15", b"\x1c" * 40, b"\x19\xfc\xff\xff\xff\x0f", b"\x18\xff\x7f", b"\x1b\x00", b"\x15" + b"\xff" * 11],
    ids=["cut off", "deep", "a long list", "a long text", "a map", "an endless number"],
)
def test_a_damaged_header_of_a_page_is_one_error_that_names_the_file(tmp_path, header):
    path = tmp_path / "data.parquet"
    content = parquet(1, Page(DATA, 1, b""))
    start = 4  # after the magic bytes
    path.write_bytes(content[:start] + header + content[start + len(header) :])
    with pytest.raises(ValueError, match=f"{path} must be a parquet file"):
        read_files([path])


# ---------------------------------------------------------------------------------------------- Arrow


def write_arrow(path, table, compression=None):
    options = pyarrow.ipc.IpcWriteOptions(compression=compression)
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, table.schema, options=options) as writer:
        writer.write_table(table)


def read(path):
    return read_files([path]).rows[:]["text"]


def stream(path):
    return [row["text"] for row, _ in stream_files([path])(None)]


@pytest.mark.parametrize("reader", [read, stream])
def test_a_compressed_arrow_stream_is_refused_and_an_ordinary_one_read(tmp_path, reader):
    path = tmp_path / "data.arrow"
    words = pyarrow.array(["a", "b", "a"] * 50)
    for column in (words, words.dictionary_encode()):
        write_arrow(path, pyarrow.table({"text": column, "more": [0.5] * 150}))
        assert list(reader(path)) == words.to_pylist()
        for compression in ("zstd", "lz4"):
            write_arrow(path, pyarrow.table({"text": column}), compression)
            with pytest.raises(ValueError, match=f"{path} must be an Arrow stream that is not compressed"):
                reader(path)


@pytest.mark.parametrize("reader", [read, stream])
def test_an_arrow_stream_whose_texts_lie_outside_of_it_is_refused(tmp_path, reader):
    path = tmp_path / "data.arrow"
    offsets = [0, 1, 2, 3, 4]
    write_arrow(path, pyarrow.table({"text": ["a", "b", "c", "d"]}))
    ends = [struct.pack("<5i", *numbers) for numbers in (offsets, [0, 1, 2, 3, 2**30])]
    content = path.read_bytes()
    assert content.count(ends[0]) == 1
    path.write_bytes(content.replace(*ends))
    with pytest.raises(ValueError, match=f"{path} must be an Arrow stream, and cannot be read as one"):
        reader(path)
