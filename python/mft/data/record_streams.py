"""Read records one after another, resuming from any earlier position, for data that need not fit in memory.

A position is JSON-compatible. For lines it is the bytes and lines before it, and for parquet the row group. For the Hub
it is the state_dict of datasets' iterable data set, which is exact if nothing is shuffled. Files are read as in
record_files.py: found by name, and read as plain columns.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow

from mft.data.formats import without_filling
from mft.data.record_files import (
    ARRAY,
    Records,
    columns_to_read,
    content_alone,
    parse_line,
    read_array,
    read_csv,
    read_lines,
    read_parquet,
    type_of,
)
from mft.files.arrow_file import map_arrow

_BATCH = 64  # rows of a table that are converted to Python objects at a time


@dataclass(frozen=True)
class RecordStream:
    """open(position) returns a Reader; position None starts at the beginning."""

    open: Callable[[Any], "Reader"]


def stream_files(paths: Sequence[Path]) -> RecordStream:
    """Return a stream of the records of files of one type, one file after another."""
    return RecordStream(lambda position: _FileReader(paths, position))


def stream_hub(dataset: datasets.IterableDataset, name: str) -> RecordStream:
    """Stream only the columns that forms read, if the columns are known: others may hold pictures, to be fetched."""
    columns = dataset.column_names
    if columns is not None:
        dataset = dataset.select_columns(columns_to_read(columns))
    return RecordStream(lambda position: _HubReader(dataset, columns or [], name, position))


def stream_records(records: Records) -> RecordStream:
    """Return a stream of records that are in memory."""
    return RecordStream(lambda position: _RecordsReader(records, position))


# ---------------------------------------------------------------------------------------------- private


class _FileReader:
    """Yields (record, its place for messages). position: [index of the file, position in it]."""

    def __init__(self, paths: Sequence[Path], position: Any) -> None:
        self._paths, self.position = paths, position or [0, None]
        self.columns: dict[str, None] = {}

    def __iter__(self) -> Iterator[tuple[dict[str, Any], str]]:
        first, inside = self.position
        for number, path in enumerate(self._paths[first:], first):
            for row, columns, place, behind in _READERS[type_of(path)](path, inside):
                self.columns.update(dict.fromkeys(columns))
                self.position = [number, behind]
                yield row, place
            inside = None


class _HubReader:
    def __init__(self, dataset: datasets.IterableDataset, columns: Sequence[str], name: str, position: Any) -> None:
        self._dataset, self._name = copy.deepcopy(dataset), name  # each reader has its own state
        self._before = position
        self._number = 0 if position is None else position["rows"]
        if position is not None:
            self._dataset.load_state_dict(position["state"])
        self.columns: dict[str, None] = dict.fromkeys(columns)

    @property
    def position(self) -> Any:
        if self._number == (self._before or {"rows": 0})["rows"]:
            return self._before
        return {"rows": self._number, "state": self._dataset.state_dict()}

    def __iter__(self) -> Iterator[tuple[dict[str, Any], str]]:
        for row in self._dataset:
            self.columns.update(dict.fromkeys(row))
            self._number += 1
            yield without_filling(content_alone(row)), f"{self._name}, row {self._number - 1}"


class _RecordsReader:
    def __init__(self, records: Records, position: Any) -> None:
        self._records, self.position = records, position or 0
        self.columns = dict.fromkeys(records.columns)

    def __iter__(self) -> Iterator[tuple[dict[str, Any], str]]:
        of_arrow = isinstance(self._records.rows, datasets.Dataset)
        while self.position < len(self._records.rows):
            row = self._records.rows[self.position]
            self.position += 1
            yield without_filling(row) if of_arrow else row, self._records.place(self.position - 1)


# Reads on from the position where it was opened. position: after the record that it returned last. columns: all that it
# has seen so far, also those that are not read.
Reader = _FileReader | _HubReader | _RecordsReader
Found = Iterator[tuple[dict[str, Any], Sequence[str], str, Any]]  # record, columns, place, position of the next record


def _read_jsonl(path: Path, start: Any) -> Found:
    for number, line, end in read_lines(path, tuple(start or (0, 0))):
        if (row := parse_line(line, f"{path}:{number}")) is not None:
            yield content_alone(row), list(row), f"{path}:{number}", list(end)


def _read_csv(path: Path, start: Any) -> Found:
    for number, row, end in read_csv(path, tuple(start or (0, 0))):
        yield content_alone(row), list(row), f"{path}:{number}", list(end)


def _read_array(path: Path, start: Any) -> Found:
    """start: number of earlier objects."""
    for number, row in enumerate(read_array(path)[start or 0 :], start or 0):
        yield content_alone(row), list(row), f"{path} item {number}", number + 1


def _read_parquet(path: Path, start: Any) -> Found:
    """start: [row group, number of earlier rows in it]."""
    for (group, inside), number, batch, names in read_parquet(path, _BATCH, tuple(start or (0, 0))):
        for j, row in enumerate(batch.to_pylist()):
            place = f"{path} row {number + j}"
            yield content_alone(without_filling(row)), names, place, [group, inside + j + 1]


def _read_arrow(path: Path, start: Any) -> Found:
    """start: number of earlier rows."""
    try:
        table = map_arrow(path)
        names = table.column_names
        table = table.select(columns_to_read(names))
        for first in range(start or 0, len(table), _BATCH):
            rows = table.slice(first, _BATCH)
            rows.validate(full=True)
            for j, row in enumerate(rows.to_pylist(), first):
                yield content_alone(without_filling(row)), names, f"{path} row {j}", j + 1
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} must be an Arrow stream, and cannot be read as one: {error}") from None


_READERS = {
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ARRAY: _read_array,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
}
