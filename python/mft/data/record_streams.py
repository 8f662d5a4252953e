"""Read records one after another, resuming from any earlier position, for data that need not fit in memory.

A position is JSON-compatible. For lines it is the bytes and lines before it, and for parquet the row group. For the Hub
it is the state_dict of datasets' iterable data set, which is exact if nothing is shuffled. Files are read as in
record_files.py: found by name, and read as plain columns.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets

from mft.data.formats import drop_filling
from mft.data.record_files import Records, columns_to_read, place_in, read_records, select_content


def stream_files(paths: Sequence[Path]) -> "RecordStream":
    """Return a stream of the records of files of one type, one file after another."""
    return lambda position: _FileReader(paths, position)


def stream_hub(dataset: datasets.IterableDataset, name: str) -> "RecordStream":
    """Stream only the columns that forms read, if the columns are known: others may hold pictures, to be fetched."""
    columns = dataset.column_names
    if columns is not None:
        dataset = dataset.select_columns(columns_to_read(columns))
    return lambda position: _HubReader(dataset, columns or [], name, position)


def stream_records(records: Records) -> "RecordStream":
    """Return a stream of records that are in memory."""
    return lambda position: _RecordsReader(records, position)


# ---------------------------------------------------------------------------------------------- private


class _FileReader:
    """Yields (record, its place for messages). position: [index of the file, position in it]."""

    def __init__(self, paths: Sequence[Path], position: Any) -> None:
        self._paths, self.position = paths, position or [0, None]
        self.columns: dict[str, None] = {}

    def __iter__(self) -> Iterator[tuple[dict[str, Any], str]]:
        first, inside = self.position
        for number, path in enumerate(self._paths[first:], first):
            for row, columns, place, behind in read_records(path, inside):
                self.columns.update(dict.fromkeys(columns))
                self.position = [number, behind]
                yield row, place_in(path, place)
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
            yield drop_filling(select_content(row)), f"{self._name}, row {self._number - 1}"


class _RecordsReader:
    def __init__(self, records: Records, position: Any) -> None:
        self._records, self.position = records, position or 0
        self.columns = dict.fromkeys(records.columns)

    def __iter__(self) -> Iterator[tuple[dict[str, Any], str]]:
        of_arrow = isinstance(self._records.rows, datasets.Dataset)
        while self.position < len(self._records.rows):
            row = self._records.rows[self.position]
            self.position += 1
            yield drop_filling(row) if of_arrow else row, self._records.place(self.position - 1)


# Reads on from the position where it was opened. position: after the record that it returned last. columns: all that it
# has seen so far, also those that are not read.
Reader = _FileReader | _HubReader | _RecordsReader
RecordStream = Callable[[Any], Reader]  # opens a stream at a position; None: at the beginning
