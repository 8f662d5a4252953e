"""Rows of data that need not fit in memory. They are made on demand, in an order that a small state can restore.

    records  ->  a window of data.buffer_size documents  ->  its rows, packed and shuffled  ->  the mix

The rows of a window depend only on its documents, data.seed and its number. So a state holds where the window begins,
and how many of its rows were given. To resume, that window is read and tokenised again, and nothing before it. (The
state of datasets' own shuffled streams lacks the contents of their buffers, so these do not resume exactly.)
"""

import hashlib
import itertools
import random
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from mft.config import DataConfig
from mft.data.formats import content_of
from mft.data.mixing import Taken, describe_mix, next_source, pool
from mft.data.packing import Rows, build_rows
from mft.data.record_files import Records
from mft.data.record_streams import Reader, RecordStream
from mft.data.sources import SPLITS, Source, content_key, form_of, name_source
from mft.data.split_rows import describe_rows, pad_of, row_budget, warn_of_few
from mft.data.tokenization import open_documents

HELD_OUT = 128  # documents for validation, and as many for test, if there is no budget
_FIRST = 64  # documents whose columns decide how all are read
_LONGEST_WINDOW = 2**25  # characters; a longer window takes no further document


@dataclass(frozen=True)
class StreamedRow:
    """A row as in Rows. document: number of its document in its source."""

    input_ids: Any
    labels: Any
    document: int
    starts: list[int]
    size: int
    scored: int
    source: str


class StreamedRows:
    """Endless training rows, as an iterator of (number, row). A source that ends starts again, shuffled differently.

    holds_packed_rows: whether rows may hold examples that must not see each other.
    """

    def __init__(self, sources: Mapping[str, "SourceRows"], config: DataConfig) -> None:
        self._sources, self._strategy = dict(sources), config.stopping_strategy
        self.length = config.sequence_length
        self.weights = {name: given.weight for name, given in (config.sources or {}).items()} or {"": 1.0}
        self.holds_packed_rows = any(source.packs for source in sources.values())
        self._taken = {name: Taken() for name in self._sources}  # in total
        self._now = [0] * len(self._sources)  # rows since all sources last started together
        self._ahead: list[StreamedRow] = []
        self._number = 0

    def __iter__(self) -> "StreamedRows":
        return self

    def __next__(self) -> tuple[int, StreamedRow]:
        row = self._ahead.pop(0) if self._ahead else self._next()
        self._number += 1
        return self._number - 1, row

    def peek(self, count: int) -> list[StreamedRow]:
        """Return the next rows without consuming them."""
        self._ahead += [self._next() for _ in range(count - len(self._ahead))]
        return self._ahead[:count]

    def state(self) -> dict[str, Any]:
        """Return a JSON-compatible state for restore. Do not call between a peek and the rows that it returned."""
        assert not self._ahead
        sources = {name: source.state() for name, source in self._sources.items()}
        taken = {name: asdict(taken) for name, taken in self._taken.items()}
        return {"row": self._number, "now": list(self._now), "taken": taken, "sources": sources}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Resume where state was taken, with the same configuration and data. Raises: ValueError if these differ."""
        self._ahead.clear()
        self._number, self._now = state["row"], list(state["now"])
        self._taken = {name: Taken(**taken) for name, taken in state["taken"].items()}
        for name, source in self._sources.items():
            with name_source(name):
                source.restore(state["sources"][name])

    def describe(self) -> list[str]:
        """Return lines on what was taken so far."""
        lines = [
            f"{name}: train: {line}".removeprefix(": ")
            for name, source in self._sources.items()
            for line in source.describe()
        ]
        return lines + (describe_mix(self._taken, self.weights) if any(self._sources) else [])

    def _next(self) -> StreamedRow:
        names, weights = list(self._sources), list(self.weights.values())
        while True:
            number = next_source(weights, self._now)
            source = self._sources[names[number]]
            with name_source(names[number]):
                row = source.next_row()
            if row is not None:
                self._now[number] += 1
                self._taken[names[number]].add(row.size, row.scored)
                return row
            if self._strategy == "first_exhausted":
                self._now = [0] * len(names)
            for ended in self._sources.values() if self._strategy == "first_exhausted" else [source]:
                ended.begin_again()


@dataclass
class _Place:
    """Where a source stands: its pass, its window and where that begins, and how many rows of each were given.

    cut, empty: numbers of examples in earlier windows, as in Rows and Documents.
    """

    passes: int
    window: int
    position: Any  # in the records' stream
    document: int
    given: int = 0
    given_before: int = 0  # in earlier windows of this pass
    cut: int = 0
    empty: int = 0


@dataclass
class SourceRows:
    """Training rows of one source. begin, first: position and number of the first document; columns: of its records.

    held_out: hashes of documents that are never trained on, wherever they occur.
    """

    name: str
    stream: RecordStream
    begin: Any
    first: int
    columns: list[str]
    held_out: set[bytes]
    config: DataConfig
    tokenizer: Any
    _reader: Reader | None = None
    _records: Iterator[tuple[dict[str, Any], str]] = field(default_factory=lambda: iter(()))
    _window: Rows | None = None
    _behind: tuple[Any, int] = (None, 0)  # position and document number at the end of the window
    _empty: int = 0  # examples in the window with nothing to score

    def __post_init__(self) -> None:
        self._place = _Place(0, 0, self.begin, self.first)

    @property
    def packs(self) -> bool:
        records = Records([], lambda i: self.name, self.columns, [])
        return self.config.packing and form_of(records) != "text"

    def next_row(self) -> StreamedRow | None:
        """Return the next row; None at the end of a pass. Raises: ValueError if the whole pass had no row."""
        place = self._place
        while True:
            if self._window is None and not self._open_window():
                if not place.given_before:
                    raise ValueError(
                        f"data.source {self.config.source!r} must leave rows to train on, got none: give more "
                        "documents, or lower data.max_eval_tokens"
                    )
                return None
            assert self._window is not None
            if place.given < len(self._window):
                place.given += 1
                return self._row(place.given - 1)
            place.position, place.document = self._behind
            place.given_before += place.given
            place.cut, place.empty = place.cut + self._window.cut, place.empty + self._empty
            place.window, place.given, self._window = place.window + 1, 0, None

    def begin_again(self) -> None:
        was = self._place
        self._place = _Place(was.passes + 1, 0, self.begin, self.first, cut=was.cut, empty=was.empty)
        self._window = self._reader = None

    def describe(self) -> list[str]:
        """Return lines on what happened to the documents so far that their rows do not show."""
        place, window = self._place, self._window
        cut, empty = place.cut + (0 if window is None else window.cut), place.empty + (window is not None) * self._empty
        lines = {
            f"{cut} examples were longer than sequence_length = {self.config.sequence_length} and were cut there": cut,
            f"{empty} examples had nothing to score and were left out": empty,
            f"the data ended {place.passes} times, and was read again in another order": place.passes,
        }
        return [line for line, count in lines.items() if count]

    def state(self) -> dict[str, Any]:
        return asdict(self._place) | {"hash": None if self._window is None else _hash(self._window)}

    def restore(self, state: Mapping[str, Any]) -> None:
        found = dict(state)
        known = found.pop("hash")
        self._place, self._window, self._reader = _Place(**found), None, None
        if known is not None:
            self._open_window()
            if self._window is None or _hash(self._window) != known:
                raise ValueError(
                    "the data must be those that the run began with, got other documents from "
                    f"{self._place.document} on: restore them, or start again with --overwrite"
                )

    def _open_window(self) -> bool:
        """Read and tokenise the next documents. Return False if there are none."""
        place, config = self._place, self.config
        if self._reader is None:
            self._reader = self.stream(place.position)
            self._records = iter(self._reader)
        rows, places, numbers, length = [], [], [], 0
        number = place.document
        for number, (row, where) in enumerate(self._records, place.document + 1):
            if content_hash(row, self.columns) not in self.held_out:
                rows.append(row)
                places.append(where)
                numbers.append(number - 1)
                length += _characters(row)
            if len(rows) == config.buffer_size or length > _LONGEST_WINDOW:
                break
        if not rows:
            self._reader = None
            return False
        self._behind = self._reader.position, number
        seed = int.from_bytes(
            hashlib.sha256(f"{config.seed} {self.name} {place.passes} {place.window}".encode()).digest()[:8], "big"
        )
        records = Records(rows, places.__getitem__, self.columns, numbers)
        documents = open_documents(records, self.tokenizer, assistant_only=config.assistant_only)
        pad = pad_of(self.tokenizer)
        window = build_rows(documents, config.sequence_length, pad, budget=None, packing=config.packing, seed=seed)
        window.document = [numbers[i] for i in window.document]
        self._empty = documents.empty
        if not config.packing:
            order = list(range(len(window)))
            random.Random(seed).shuffle(order)
            window.reorder(order)
        self._window = window
        return True

    def _row(self, number: int) -> StreamedRow:
        window = self._window
        assert window is not None
        labels = window.labels[number]
        return StreamedRow(
            window.input_ids[number],
            labels,
            window.document[number],
            window.starts[number],
            window.sizes[number],
            int((labels[1:] >= 0).sum()),
            self.name,
        )


def open_streamed(
    config: DataConfig, tokenizer: Any, source: Source
) -> tuple[StreamedRows, dict[str, Rows], list[str]]:
    """Return (training rows, rows of validation and test, notes). Raises: ValueError that names the source.

    Held-out rows come from the source's own splits if it has them, else from its first documents. Training skips every
    document that equals a held-out one. max_eval_tokens counts one row per document.
    """
    parts = source.parts or {"": source}
    weights = {name: given.weight for name, given in (config.sources or {}).items()} or {"": 1.0}
    streams, held_out, notes = {}, {}, []
    for name, part in parts.items():
        own = config.source_config(name) if name else config
        with name_source(name):
            opened = _open(name, own, tokenizer, part, weights[name] / sum(weights.values()))
        streams[name], held_out[name], said = opened
        notes += [f"{name}: {note}" if name else note for note in said]
    if "" in parts:
        return StreamedRows(streams, config), held_out[""], notes
    pooled = {split: pool({name: rows[split] for name, rows in held_out.items()}, held_out) for split in SPLITS[1:]}
    return StreamedRows(streams, config), pooled, notes


def content_hash(row: dict[str, Any], columns: Sequence[str]) -> bytes:
    return hashlib.sha256(content_key(row, content_of(columns))).digest()


def count_rows(dataset: Any) -> int | None:
    """Return the number of rows; None for a stream."""
    return None if isinstance(dataset, StreamedRows) else len(dataset)


# ---------------------------------------------------------------------------------------------- private


def _open(
    name: str, config: DataConfig, tokenizer: Any, source: Source, share: float
) -> tuple[SourceRows, dict[str, Rows], list[str]]:
    """Read the held-out records, and look at the first training records."""
    opened, notes = source.open_streams(), list(source.notes)
    training = opened["train"](None)
    records = iter(training)
    begin: Any = None
    first = 0  # number of the first training document
    budget = row_budget(config, share, training=False)
    held: dict[str, Records] = {}
    for split in SPLITS[1:]:
        if split in opened:
            held[split] = _records_of(opened[split](None), None, budget, 0)
            continue
        held[split] = _records_of(training, records, budget, first)
        begin, last = training.position, first + len(held[split].rows) - 1
        notes.append(f"{split}: documents {first} to {last} of the stream, which are not trained on")
        first = last + 1
    list(itertools.islice(records, _FIRST))
    columns = list(training.columns)
    if not columns:
        raise ValueError(f"data.source {config.source!r} must hold examples, got none")
    built = {}
    for split, kept in held.items():
        kept.columns = list(dict.fromkeys([*kept.columns, *columns]))
        built[split], said = _held_out_rows(split, kept, config, tokenizer, budget)
        notes += said
    hashes = {content_hash(row, columns) for kept in held.values() for row in kept.rows}
    notes.append(
        f"train: a stream from document {first} on, {config.buffer_size} documents at a time packed and shuffled"
    )
    return SourceRows(name, opened["train"], begin, first, columns, hashes, config, tokenizer), built, notes


def _records_of(
    reader: Reader, records: Iterator[tuple[dict[str, Any], str]] | None, budget: int | None, first: int
) -> Records:
    """Return the next records of a reader, up to a budget of rows. records: its iterator, if it is in use already."""
    found = list(itertools.islice(iter(reader) if records is None else records, budget or HELD_OUT))
    places = [place for _, place in found]
    numbers = range(first, first + len(found))
    return Records([row for row, _ in found], places.__getitem__, list(reader.columns), numbers)


def _held_out_rows(
    split: str, kept: Records, config: DataConfig, tokenizer: Any, budget: int | None
) -> tuple[Rows, list[str]]:
    if not len(kept.rows):
        raise ValueError(f"data.source {config.source!r} must hold examples, got an empty {split} split")
    documents = open_documents(kept, tokenizer, assistant_only=config.assistant_only)
    rows = build_rows(documents, config.sequence_length, pad_of(tokenizer), budget=budget, packing=False, seed=0)
    rows.document = [kept.numbers[i] for i in rows.document]
    notes = describe_rows(split, rows, documents.empty, len(set(rows.document)), len(kept.rows))
    if not len(rows):
        raise ValueError(
            f"data.source {config.source!r} must leave rows to score in every split, got none for {split}: {notes[-1]}"
        )
    return rows, notes + warn_of_few(split, len(set(rows.document)), sum(rows.scored()))


def _hash(rows: Rows) -> int:
    value = 0
    for ids in rows.input_ids:
        value = zlib.crc32(ids.tobytes(), value)
    return value


def _characters(value: Any) -> int:
    """Return the number of characters of all strings in a record."""
    if isinstance(value, str):
        return len(value)
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return sum(map(_characters, inner))
