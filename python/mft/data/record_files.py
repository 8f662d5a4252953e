"""Read records from data files: JSON lines, parquet, CSV, a JSON array, or the output of datasets' save_to_disk.

A data set's card, a loading script or a file's declared features can name URLs and other people's files, and datasets
follows them. So files are found by name here, and read as plain columns.
"""

import bisect
import contextlib
import csv
import gzip
import hashlib
import itertools
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet

from mft.data.formats import CONTENT_COLUMNS, FORMS, PREFERENCE, content_of, drop_filling
from mft.data.growth import bytes_of_line, check_growth
from mft.files.arrow_file import map_arrow
from mft.files.cache import sha256_of
from mft.files.json_file import parse_value, read_object, short
from mft.files.parquet_file import read_claims

FILE_TYPES = (".jsonl", ".parquet", ".csv")
TYPES = ".jsonl, .parquet or .csv"
ARRAY = ".json"  # only as a single file: in a directory, such files describe the data
_ZIPPED = (".jsonl", ".csv")  # may end in .gz
LONGEST_LINE = 64 * 2**20  # bytes; a file without line ends must not fill the memory
SAVED = ("dataset_dict.json", "state.json")  # of save_to_disk: for several splits, for one split
_ROWS_AT_ONCE = 1024  # of a table, while it is read
_FEW = 64  # rows of a table that are converted to Python objects at a time
_MOST_BATCH = 2**26  # bytes of these rows, if each row is as long as the parquet dictionary
_LONGEST_STATE = 16 * 2**20  # bytes of the files in SAVED
_SPLIT_WORDS = {
    "train": {"train", "training"},
    "validation": {"validation", "valid", "dev", "val"},
    "test": {"test", "testing", "eval", "evaluation"},
}
_SHARD = re.compile(r"(\w[\w.]*)-\d{5}-of-\d{5}")  # data/train_sft-00000-of-00003.parquet, the Hub's naming


@dataclass
class Records:
    """Rows of one origin. place(i) describes where row i is; numbers[i] is its document number."""

    rows: Sequence[dict[str, Any]]
    place: Callable[[int], str]
    columns: list[str]
    numbers: Sequence[int]

    def select(self, picked: Sequence[int]) -> "Records":
        rows = self.rows.select(picked) if isinstance(self.rows, datasets.Dataset) else [self.rows[i] for i in picked]
        return Records(rows, lambda i: self.place(picked[i]), self.columns, [self.numbers[i] for i in picked])


def type_of(path: Path) -> str:
    """Return a file's suffix, without .gz if the type may be compressed."""
    inner = path.with_suffix("").suffix
    return inner if path.suffix == ".gz" and inner in _ZIPPED else path.suffix


def find_splits(directory: Path) -> tuple[dict[str, list[Path]], list[Path]]:
    """Return ({split: its files in order}, files that were left out), by names alone.

    A word for a split (train, validation, test or a synonym) in the name of the file or of its nearest directory
    decides. If no file has one, all files are train. CSV files next to data of another type are ignored.
    Raises: ValueError if there are no data files, or files of several types, or a name with words of several splits.
    """
    if any((directory / name).is_file() for name in SAVED):
        return _saved_splits(directory), []
    inside = {path: path.relative_to(directory) for path in sorted(directory.rglob("*"))}
    shown = [path for path, name in inside.items() if not any(part.startswith((".", "__")) for part in name.parts)]
    files = [path for path in shown if type_of(path) in FILE_TYPES and path.is_file()]
    types = {type_of(path) for path in files}
    if len(types) > 1:
        types.discard(".csv")
        files = [path for path in files if type_of(path) in types]
    if len(types) != 1:
        found = f"{' and '.join(sorted(types))}, perhaps the same twice: name the directory of one" if types else "none"
        raise ValueError(f"data.source must be a directory with {TYPES} files, got {directory} with {found}")
    sharded = {path: _SHARD.match(path.name) for path in files if inside[path].parent == Path("data")}
    split_of = {path: match[1] for path, match in sharded.items() if match}
    if not split_of:
        split_of = {path: split for path in files if (split := _split_by_words(directory, inside[path]))}
    if not split_of:
        return {"train": files}, []
    splits = {split: [path for path in split_of if split_of[path] == split] for split in sorted(set(split_of.values()))}
    return splits, [path for path in files if path not in split_of]


def read_files(paths: Sequence[Path]) -> Records:
    """Return the records of files of one type, one file after another, with content columns only."""
    parts = [_TABLES.get(type_of(path), _read_list)(path) for path in paths]
    starts = list(itertools.accumulate((len(numbers) for _, numbers, _ in parts), initial=0))
    columns = sorted({column for *_, names in parts for column in names})
    if isinstance(parts[0][0], pyarrow.Table):
        try:
            table = pyarrow.concat_tables([rows for rows, *_ in parts], promote_options="permissive")
        except pyarrow.ArrowException as error:
            raise ValueError(
                f"{paths[0]} and the files next to it must have columns of the same types: {error}"
            ) from None
        rows: Sequence[dict[str, Any]] = datasets.Dataset(table)
    else:
        rows = [row for found, *_ in parts for row in found]

    def place(i: int) -> str:
        part = bisect.bisect_right(starts, i) - 1
        return place_in(paths[part], parts[part][1][i - starts[part]])

    return Records(rows, place, columns, range(starts[-1]))


Position = tuple[int, int]  # bytes and lines of a file before it


def read_lines(path: Path, start: Position = (0, 0), *, kept: bool = False) -> Iterator[tuple[int, str, Position]]:
    """Yield (number, line with its end, position of the next line) for each line from start on.

    Bytes count the text: a .gz file is unpacked again up to start.
    kept: whether the caller keeps all lines; for a .gz file they must then fit check_growth together.
    """
    zipped, held = path.suffix == ".gz", 0
    with gzip.open(path) if zipped else path.open("rb") as file:
        try:
            end, before = start
            file.seek(end)
            for number in itertools.count(before + 1):
                line = file.readline(LONGEST_LINE + 1)
                if not line:
                    break
                if len(line) > LONGEST_LINE:
                    raise ValueError(
                        f"{path}:{number}: a line must have at most {LONGEST_LINE} bytes, got more: write one "
                        "example per line"
                    )
                if zipped:
                    held = bytes_of_line(line) + (held if kept else 0)
                    check_growth(path, held)
                text = _decoded(line, f"{path}:{number}", end)
                end += len(line)
                yield number, text, (end, number)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(f"{path} must be a gzip file, and cannot be read as one: {error}") from None


# A record, the columns known with it, its number for place_in, the position of the next record.
Read = tuple[dict[str, Any], Sequence[str], int, Any]


def read_records(path: Path, start: Any = None, *, kept: bool = False) -> Iterator[Read]:
    """Yield the records of one file from the position start on (None: all), with content columns only.

    kept: whether the caller keeps all records; a compressed file must then fit check_growth as a whole.
    """
    return _RECORDS[type_of(path)](path, start, kept)


def place_in(path: Path, number: int) -> str:
    """Return how messages name the record with this number of a file: its line, item or row."""
    return f"{path}{_NUMBERED[type_of(path)]}{number}"


def hash_splits(splits: Mapping[str, Sequence[Path]]) -> str:
    """Return the SHA-256 of the splits and their files' contents."""
    lines = [f"{split} {sha256_of(path)}" for split, paths in sorted(splits.items()) for path in paths]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


# ---------------------------------------------------------------------------------------------- private


# Rows (a list of dictionaries, or a pyarrow.Table), their numbers for place_in, and the names of all columns.
_File = tuple[Any, Sequence[int], Iterable[str]]


def _read_list(path: Path) -> _File:
    """Read a file whose records become a list of dictionaries."""
    rows, numbers, columns = [], [], dict[str, None]()
    for row, names, number, _ in read_records(path, kept=True):
        columns.update(dict.fromkeys(names))
        rows.append(row)
        numbers.append(number)
    return rows, numbers, columns


def select_content(row: dict[str, Any]) -> dict[str, Any]:
    """Return the row without the columns that no form reads."""
    return {column: row[column] for column in CONTENT_COLUMNS if column in row}


def _jsonl_records(path: Path, start: Any, kept: bool) -> Iterator[Read]:
    for number, line, end in read_lines(path, tuple(start or (0, 0)), kept=kept):
        if (row := _parse_line(line, f"{path}:{number}")) is not None:
            yield select_content(row), list(row), number, list(end)


def _parse_line(line: str, place: str) -> dict[str, Any] | None:
    """Return the object in a line of JSON; None if the line is empty."""
    if not line.strip(" \t\r\n\v\f"):
        return None
    try:
        row = json.loads(line)
    except RecursionError:
        raise ValueError(
            f"{place}: JSON must nest a few levels deep, got one that is too deep to be read: examples need no more "
            "than messages, each with a role and a content"
        ) from None
    except ValueError as error:  # also for a number with too many digits
        if line.lstrip().startswith("["):
            row = []
        else:
            said = f"{error.msg} at character {error.colno}" if isinstance(error, json.JSONDecodeError) else error
            raise ValueError(f"{place}: broken JSON, must be one object per line: {said}") from None
    if isinstance(row, list):
        raise ValueError(f"{place}: must be one object per line, got an array: name a file of one array {ARRAY}")
    if not isinstance(row, dict):
        raise ValueError(f"{place}: must be a JSON object, got a {type(row).__name__}")
    return row


def _array_records(path: Path, start: Any, kept: bool) -> Iterator[Read]:
    """start: number of earlier objects. The file is read whole."""
    try:
        rows = parse_value(path.read_bytes(), path)
    except ValueError as error:
        raise ValueError(f"{error}; must be one array, name a file of one object per line .jsonl") from None
    for place, row in enumerate(rows) if isinstance(rows, list) else [(None, rows)]:
        if place is None or not isinstance(row, dict):
            where, rule = (path, "an array of objects") if place is None else (f"{path} item {place}", "a JSON object")
            raise ValueError(f"{where}: must be {rule}, got {short(row)}: put examples alone into the file")
    for number, row in enumerate(rows[start or 0 :], start or 0):
        yield select_content(row), list(row), number, number + 1


def _csv_records(path: Path, start: Any, kept: bool) -> Iterator[Read]:
    start = tuple(start or (0, 0))
    records = _csv_values(path, kept=kept)
    place, header, begin = next(records, (0, [], start))
    if len(set(header)) != len(header):
        raise ValueError(f"{path}:{place}: the header must name each column once, got {','.join(header)[:100]}")
    if start > begin:
        records = _csv_values(path, start, kept=kept)
    for number, values, end in records:
        if len(values) != len(header):
            raise ValueError(
                f"{path}:{number}: must have {len(header)} values, as many as the header names, got {len(values)}: put "
                "quotes around one that has commas"
            )
        yield select_content(dict(zip(header, values))), header, number, list(end)


def _decoded(line: bytes, place: str, start: int) -> str:
    """Decode a line that starts at byte ``start`` of its file."""
    try:
        return line.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        at = start + len(line) - len(error.object) + error.start  # error.object lacks the byte order mark
        encoding = "UTF-16" if line[:2] in (b"\xff\xfe", b"\xfe\xff") else "LATIN1"
        raise ValueError(
            f"{place}: must be UTF-8 text, got 0x{error.object[error.start]:02x} at byte {at} of the file: convert it, "
            f"if it is {encoding} by iconv -f {encoding} -t UTF-8"
        ) from None


def _csv_values(path: Path, start: Position = (0, 0), *, kept: bool) -> Iterator[tuple[int, list[str], Position]]:
    """Yield (first line, values, position of the next record) for each record that is not empty."""
    end = begin = start

    def feed() -> Iterator[str]:
        nonlocal end
        for _, line, behind in read_lines(path, start, kept=kept):
            if behind[0] - begin[0] > LONGEST_LINE:
                raise ValueError(
                    f"{path}:{begin[1] + 1}: a record must have at most {LONGEST_LINE} bytes, got more: does a quote "
                    "have no end?"
                )
            end = behind
            yield line

    reader = csv.reader(feed(), strict=True)
    limit = csv.field_size_limit()
    while True:
        begin, number = end, end[1] + 1
        csv.field_size_limit(LONGEST_LINE)  # a setting of the whole process
        try:
            values = next(reader, None)
        except csv.Error as error:
            raise ValueError(
                f"{path}:{number}: broken CSV: {error}: put quotes around what has commas, quotes or line ends, and "
                "write quotes in it twice"
            ) from None
        finally:
            csv.field_size_limit(limit)
        if values is None:
            return
        if values:
            yield number, values, end


def _parquet_batches(
    path: Path, most_rows: int, start: Position = (0, 0), *, kept: bool
) -> Iterator[tuple[Position, int, pyarrow.RecordBatch, list[str]]]:
    """Yield ((row group, rows before in it), rows before in the file, rows, names of all columns), few rows at a time.

    start: row group, and how many of its rows to skip. kept: whether the caller keeps all rows.
    Raises: ValueError if a row group (if kept: all of them together) takes more than check_growth allows.
    """
    first, before = start
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            columns = columns_to_read(names)
            claims = read_claims(path, file.metadata, columns)
            check_growth(path, (sum if kept else max)([group.bytes for group in claims] or [0]))
            number, held = sum(group.rows for group in claims[:first]), 0
            for group in range(first, file.num_row_groups):
                # Each row of a batch may be as large as the whole dictionary.
                rows = max(1, min(most_rows, _MOST_BATCH // max(1, claims[group].dictionary)))
                inside = 0
                for batch in file.iter_batches(rows, row_groups=[group], columns=columns):
                    held = batch.nbytes + (held if kept else 0)
                    check_growth(path, held)
                    skipped = min(max(before - inside, 0), len(batch)) if group == first else 0
                    yield (group, inside + skipped), number + inside + skipped, batch.slice(skipped), names
                    inside += len(batch)
                number += inside
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} must be a parquet file, and cannot be read as one: {error}") from None


def _parquet_records(path: Path, start: Any, kept: bool) -> Iterator[Read]:
    """start: [row group, number of earlier rows in it]."""
    for (group, inside), number, batch, names in _parquet_batches(path, _FEW, tuple(start or (0, 0)), kept=kept):
        for j, row in enumerate(batch.to_pylist()):
            yield select_content(drop_filling(row)), names, number + j, [group, inside + j + 1]


def _read_parquet(path: Path) -> _File:
    batches = [batch for _, _, batch, _ in _parquet_batches(path, _ROWS_AT_ONCE, kept=True)]
    schema = pyarrow.parquet.read_schema(path)
    table = pyarrow.Table.from_batches(batches) if batches else schema.empty_table()
    return _table_records(table.select(columns_to_read(schema.names)), schema.names)


@contextlib.contextmanager
def _map_content(path: Path) -> Iterator[tuple[pyarrow.Table, list[str]]]:
    """Yield the content columns of an Arrow stream, which the block must validate, and the names of all columns."""
    try:
        table = map_arrow(path)
        yield table.select(columns_to_read(table.column_names)), table.column_names
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} must be an Arrow stream, and cannot be read as one: {error}") from None


def _arrow_records(path: Path, start: Any, kept: bool) -> Iterator[Read]:
    """start: number of earlier rows."""
    with _map_content(path) as (content, names):
        for first in range(start or 0, len(content), _FEW):
            rows = content.slice(first, _FEW)
            rows.validate(full=True)
            for j, row in enumerate(rows.to_pylist(), first):
                yield select_content(drop_filling(row)), names, j, j + 1


def _read_arrow(path: Path) -> _File:
    with _map_content(path) as (content, names):
        content.validate(full=True)
    return _table_records(content, names)


_RECORDS: dict[str, Callable[[Path, Any, bool], Iterator[Read]]] = {
    ".jsonl": _jsonl_records,
    ".parquet": _parquet_records,
    ".csv": _csv_records,
    ARRAY: _array_records,
    ".arrow": _arrow_records,
}
_TABLES = {".parquet": _read_parquet, ".arrow": _read_arrow}  # read whole as columns; others as lists of records
_NUMBERED = {".jsonl": ":", ".csv": ":", ARRAY: " item ", ".parquet": " row ", ".arrow": " row "}  # see place_in


def columns_to_read(names: list[str]) -> list[str]:
    pairs = [name for name in FORMS[PREFERENCE].needs if name in names]  # also if another form comes first
    return list(dict.fromkeys([*content_of(names), *pairs])) or names[:1]  # one column at least, to count rows


def _table_records(table: pyarrow.Table, columns: list[str]) -> _File:
    # The metadata may declare pictures and sounds, which datasets would fetch from the places named there.
    return table.replace_schema_metadata(None), range(len(table)), columns


def _saved_splits(directory: Path) -> dict[str, list[Path]]:
    """Return the files of save_to_disk by split; all are inside the directory."""
    path = directory / SAVED[0]
    if not path.is_file():
        return {"train": _saved_files(directory)}
    names = read_object(path, _LONGEST_STATE).get("splits")
    return {name: _saved_files(directory / name) for name in _checked(names, path, "splits", Path.is_dir)}


def _saved_files(directory: Path) -> list[Path]:
    path = directory / SAVED[1]
    entries = read_object(path, _LONGEST_STATE).get("_data_files")
    names = [entry.get("filename") if isinstance(entry, dict) else entry for entry in entries or ()]
    return [directory / name for name in _checked(names, path, "_data_files", Path.is_file)]


def _checked(names: Any, path: Path, key: str, is_kind: Callable[[Path], bool]) -> list[str]:
    """Return the names that the file at path lists. Raises ValueError unless all of them are next to it."""
    plain = isinstance(names, list) and all(isinstance(name, str) and Path(name).name == name for name in names)
    if not plain or not names or not all(is_kind(path.parent / name) for name in names):
        raise ValueError(f"{path}: {key} must be the names of files or directories next to it, got {str(names)[:100]}")
    return names


def _split_by_words(directory: Path, name: Path) -> str | None:
    """Return the split whose word is nearest to the end of this path inside directory."""
    for part in (name.stem, *(parent.name for parent in name.parents)):
        words = set(re.split(r"[-._ 0-9]+", part.lower()))
        found = [split for split, known in _SPLIT_WORDS.items() if words & known]
        if len(found) > 1:
            raise ValueError(
                f"data.source {str(directory)!r} must have files of one split each, got {name}, which names "
                f"{' and '.join(found)}: rename it"
            )
        if found:
            return found[0]
    return None
