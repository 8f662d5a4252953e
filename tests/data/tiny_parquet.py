"""Parquet files written by hand, whose pages claim more than they hold: one optional string column, "text"."""

import struct
from dataclasses import dataclass

import pyarrow

I32, I64, BINARY, LIST, STRUCT = 5, 6, 8, 9, 12  # thrift's types, in its compact format
DATA, DICTIONARY, DATA_V2 = 0, 2, 3
PLAIN, RLE, RLE_DICTIONARY = 0, 3, 8
ZSTD = 6


@dataclass
class Page:
    """kind: DATA or DICTIONARY. values: the number that its header claims. content: its bytes before compression."""

    kind: int
    values: int
    content: bytes
    encoding: int = PLAIN

    def written(self) -> bytes:
        packed = pyarrow.compress(self.content, "zstd", asbytes=True)
        about = {1: (I32, self.values), 2: (I32, self.encoding)}
        if self.kind == DATA:
            about |= {3: (I32, RLE), 4: (I32, RLE)}
        sizes = {1: (I32, self.kind), 2: (I32, len(self.content)), 3: (I32, len(packed))}
        return struct_of(sizes | {7 if self.kind == DICTIONARY else 5: (STRUCT, about)}) + packed


def nulls(count: int) -> Page:
    """Return a page of ``count`` null values."""
    return Page(DATA, count, with_length(run(count, 0)))


def same(count: int) -> Page:
    """Return a page of ``count`` values that all are the dictionary's first."""
    return Page(DATA, count, with_length(run(count, 1)) + b"\x01" + run(count, 0), RLE_DICTIONARY)


def dictionary(text: bytes) -> Page:
    """Return a dictionary of one string."""
    return Page(DICTIONARY, 1, with_length(text))


def parquet(rows: int, *pages: Page, values: int | None = None, unpacked: int | None = None) -> bytes:
    """Return a file of one row group. values, unpacked: false claims of its footer about the column."""
    head = b"PAR1"
    written = [page.written() for page in pages]
    size = sum(map(len, written))
    begins = {(DICTIONARY if page.kind == DICTIONARY else DATA): 0 for page in pages}
    place = len(head)
    for page, content in zip(pages, written):
        begins[page.kind] = begins.get(page.kind) or place
        place += len(content)
    about = {
        1: (I32, 6),  # bytes
        2: (LIST, (I32, [PLAIN, RLE, RLE_DICTIONARY])),
        3: (LIST, (BINARY, [b"text"])),
        4: (I32, ZSTD),
        5: (I64, rows if values is None else values),
        6: (I64, size if unpacked is None else unpacked),
        7: (I64, size),
        9: (I64, begins[DATA]),
    }
    if DICTIONARY in begins:
        about[11] = (I64, begins[DICTIONARY])
    group = {1: (LIST, (STRUCT, [{2: (I64, 4), 3: (STRUCT, about)}])), 2: (I64, size), 3: (I64, rows)}
    root = {4: (BINARY, b"schema"), 5: (I32, 1)}
    column = {1: (I32, 6), 3: (I32, 1), 4: (BINARY, b"text"), 6: (I32, 0)}
    footer = struct_of({1: (I32, 1), 2: (LIST, (STRUCT, [root, column])), 3: (I64, rows), 4: (LIST, (STRUCT, [group]))})
    return head + b"".join(written) + footer + struct.pack("<I", len(footer)) + head


# ---------------------------------------------------------------------------------------------- thrift


def with_length(content: bytes) -> bytes:
    return struct.pack("<I", len(content)) + content


def run(count: int, value: int) -> bytes:
    """Encode ``count`` equal one-bit values as a run, in parquet's hybrid of runs and bits."""
    return varint(count << 1) + bytes([value])


def varint(number: int) -> bytes:
    low, number = number & 127, number >> 7
    return bytes([low | 128]) + varint(number) if number else bytes([low])


def struct_of(fields: dict) -> bytes:
    written, before = b"", 0
    for number, (kind, value) in sorted(fields.items()):
        written += bytes([(number - before) << 4 | kind]) + value_of(kind, value)
        before = number
    return written + b"\0"


def value_of(kind: int, value) -> bytes:
    if kind in (I32, I64):
        return varint(value << 1 if value >= 0 else (-value << 1) - 1)
    if kind == BINARY:
        return varint(len(value)) + value
    if kind == STRUCT:
        return struct_of(value)
    inner, items = value
    return bytes([min(len(items), 15) << 4 | inner]) + b"".join(value_of(inner, item) for item in items)
