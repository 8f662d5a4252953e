"""Read what the pages of an untrusted parquet file claim, from the page headers only.

    magic | header, page; header, page; ... of a column of a row group; ... | footer, its length, magic

(apache/parquet-format.) A page of 20 bytes may claim two billion values, or a gigabyte after unpacking. pyarrow
allocates the memory for them at once, and the sums in the footer may be wrong.
"""

import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet

from mft.files.cursor import Cursor, Damaged
from mft.files.regular_file import open_regular

_DICTIONARY = 2  # the type of a dictionary page
_DEEPEST = 8  # most levels of a header that are read; a valid header has 4
_OFFSET = 4  # bytes that Arrow takes for a text value in addition to its characters
# The kinds of a field in Thrift's compact protocol.
_TRUE, _FALSE, _BYTE, _I16, _I32, _I64, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT = range(1, 13)
_UNPACKED, _PACKED, _TYPE = 2, 3, 1  # fields of a page's header


@dataclass(frozen=True)
class GroupClaims:
    """What a row group claims: its rows, the bytes that Arrow needs for them at least, and its largest dictionary."""

    rows: int
    bytes: int
    dictionary: int


def read_claims(path: Path, metadata: pyarrow.parquet.FileMetaData, columns: Sequence[str]) -> list[GroupClaims]:
    """Return what each row group claims for these columns, given the footer. Raises: ValueError if damaged; OSError."""
    with open_regular(path) as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        try:
            return [_group(content, metadata.row_group(i), columns) for i in range(metadata.num_row_groups)]
        except Damaged as error:
            raise ValueError(f"{path} must be a parquet file, got one with {error}: copy it again") from None


def _group(content: mmap.mmap, group: pyarrow.parquet.RowGroupMetaData, columns: Sequence[str]) -> GroupClaims:
    claimed = dictionary = 0
    for number in range(group.num_columns):
        column = group.column(number)
        name = column.path_in_schema
        wanted = any(name == one or name.startswith(f"{one}.") for one in columns)
        if not wanted or not column.num_values:
            continue
        start = column.data_page_offset
        if column.has_dictionary_page and 0 < column.dictionary_page_offset < start:
            start = column.dictionary_page_offset
        cursor = Cursor(content, start)
        while cursor.place < start + column.total_compressed_size:
            header = _struct(cursor)
            unpacked, packed = header.get(_UNPACKED, 0), header.get(_PACKED, 0)
            if unpacked < 0 or packed < 0:
                raise Damaged(f"a page of {packed} bytes before byte {cursor.place}")
            cursor.skip(packed)
            claimed += unpacked
            if header.get(_TYPE) == _DICTIONARY:
                dictionary = max(dictionary, unpacked)
        claimed += _OFFSET * column.num_values  # pyarrow reads at most num_values values from the pages
    return GroupClaims(group.num_rows, claimed + _OFFSET * group.num_rows, dictionary)


# ---------------------------------------------------------------------------------------------- thrift


def _struct(cursor: Cursor, depth: int = 0) -> dict[int, int]:
    """Read a struct and return its numeric fields {field: value}. Other fields are skipped."""
    if depth > _DEEPEST:
        raise Damaged(f"a header of more than {_DEEPEST} levels before byte {cursor.place}")
    numbers: dict[int, int] = {}
    field = 0
    while head := cursor.number("B"):
        kind = head & 15
        field = field + (head >> 4) if head >> 4 else _signed(cursor)
        value = _value(cursor, kind, depth)
        if value is not None:
            numbers[field] = value
    return numbers


def _value(cursor: Cursor, kind: int, depth: int) -> int | None:
    if kind in (_I16, _I32, _I64):
        return _signed(cursor)
    if kind == _STRUCT:
        _struct(cursor, depth + 1)
    elif kind == _BINARY:
        cursor.skip(_unsigned(cursor))
    elif kind in (_BYTE, _DOUBLE):
        cursor.skip(1 if kind == _BYTE else 8)
    elif kind in (_LIST, _SET):
        head = cursor.number("B")
        for _ in range(_unsigned(cursor) if head >> 4 == 15 else head >> 4):
            _element(cursor, head & 15, depth)
    elif kind not in (_TRUE, _FALSE):  # a map, which no page's header has, or an unknown kind
        raise Damaged(f"a header of the unknown type {kind} before byte {cursor.place}")
    return None


def _element(cursor: Cursor, kind: int, depth: int) -> None:
    if depth > _DEEPEST:
        raise Damaged(f"a header of more than {_DEEPEST} levels before byte {cursor.place}")
    if kind in (_TRUE, _FALSE):
        cursor.skip(1)
    else:
        _value(cursor, kind, depth + 1)


def _unsigned(cursor: Cursor) -> int:
    value = shift = 0
    while shift < 70:  # bits: ten bytes of seven
        byte = cursor.number("B")
        value |= (byte & 127) << shift
        if byte < 128:
            return value
        shift += 7
    raise Damaged(f"a number without an end before byte {cursor.place}")


def _signed(cursor: Cursor) -> int:
    value = _unsigned(cursor)
    return (value >> 1) ^ -(value & 1)
