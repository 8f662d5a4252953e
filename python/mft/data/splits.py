"""Data for training and evaluation: three data sets of fixed-length rows, made once and kept in the cache."""

import dataclasses
import hashlib
import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy
import pyarrow

from mft.config import HELD_OUT_SHARE, DataConfig
from mft.data.mixing import build_mix
from mft.data.packing import Rows
from mft.data.sources import NAMED, SPLITS, Source, open_source
from mft.data.split_rows import build_splits, pad_of
from mft.data.streams import StreamedRows, count_rows, open_streamed
from mft.files.atomic import atomic_directory
from mft.files.cache import cache_root, sha256_of

logger = logging.getLogger(__name__)

# Keys added to the configuration later. They do not enter the rows' key while they have these defaults.
_LATER: dict[str, Any] = {
    "sources": None,
    "stopping_strategy": "first_exhausted",
    "streaming": False,
    "buffer_size": 1000,
}
_LATER |= {"validation_share": HELD_OUT_SHARE, "test_share": HELD_OUT_SHARE}
FORMAT = 5  # increment when the rows made from the same data change
_FORMAT_OF_NAMED = 4  # for NAMED sources, whose rows have not changed since
NOTES_FILE = "notes.json"
FILES = (*(f"{split}.arrow" for split in SPLITS), NOTES_FILE)
SUMS_FILE = "SHA256SUMS"  # of FILES, in the format of sha256sum


@dataclass
class Splits:
    """Three data sets with columns input_ids, labels (each sequence_length; -100 is not scored), document and starts.

    Rows of validation and test never mix documents; rows of train do if data.packing is on. starts: where in a row
    examples begin that must not see each other; only 0 in a row with one example, and in rows of texts.
    A mix also has a column source with the sources' names; no two sources share a document number.
    notes: sentences that a reader of the results must know: where splits came from, what was cut or left out.
    key identifies the rows: another configuration, source or tokenizer has another key.
    With data.streaming, train has no length, and is made while it is read; the others are in memory.
    A held-out split is empty if its share is 0 and the source has none.
    """

    train: datasets.Dataset | StreamedRows
    validation: datasets.Dataset
    test: datasets.Dataset
    notes: list[str] = field(default_factory=list)
    key: str = ""

    def rows_of(self, split: str) -> datasets.Dataset | StreamedRows:
        """Return a split. Raises: ValueError if it is empty."""
        rows = getattr(self, split)
        if count_rows(rows) == 0:
            raise ValueError(
                f"data.{split}_share must be above 0 for a loss on {split}, got 0: give the source a split named "
                f"{split}, or train with a share above 0"
            )
        return rows


def load_splits(config: DataConfig, tokenizer: Any, source: Source | None = None, *, pairs: bool = False) -> Splits:
    """Return the rows of config.source, or of ``source`` if it is open already.

    max_train_tokens counts whole rows, padding included; so does max_eval_tokens (for validation and test each) for
    texts and problems. For other examples, which have one row each, it counts tokens without padding.
    pairs: rows hold preference pairs, two examples each, the chosen and the rejected one; for objectives that compare.
    The evaluation rows do not depend on config.seed, so that runs with different seeds can be compared.
    Raises: ValueError that names the file, line or row, and the rule that it breaks.
    """
    if config.streaming and pairs:
        raise ValueError(
            "data.streaming must be false with preference pairs, because training reads each pair again by its row "
            "number, got true: load them without streaming"
        )
    if tokenizer.eos_token_id is None:
        raise ValueError("tokenizer must have an end-of-sequence token, which closes a document; got none")
    source = source or open_source(config)
    if config.streaming:
        return _streamed(config, tokenizer, source)
    directory = cache_root() / "rows" / _key(config, source.fingerprint, tokenizer, pairs=pairs)
    if not _is_whole(directory):
        if directory.exists():
            logger.warning("the rows kept in %s are damaged or incomplete: they are made again", directory)
        built, notes = (build_mix if source.parts else build_splits)(config, tokenizer, source, pairs=pairs)
        source.check()
        # Another process may make and open them meanwhile: then its rows stay.
        with atomic_directory(directory, replace=lambda: not _is_whole(directory)) as scratch:
            for split, rows in built.items():
                _write(rows, scratch / f"{split}.arrow")
            (scratch / NOTES_FILE).write_text(json.dumps(notes), encoding="utf-8")
            (scratch / SUMS_FILE).write_text(_sums(scratch), encoding="utf-8")
    notes = json.loads((directory / NOTES_FILE).read_text(encoding="utf-8"))
    for note in notes:
        logger.info(note)
    found = {split: datasets.Dataset.from_file(str(directory / f"{split}.arrow")) for split in SPLITS}
    for split, documents in source.reserved.items():
        kept = [row for row, document in enumerate(found[split]["document"]) if document not in documents]
        if len(kept) < len(found[split]):
            notes.append(f"{split}: {len(found[split]) - len(kept)} rows belong to the reserve and were left out")
            found[split] = found[split].select(kept)
    return Splits(found["train"], found["validation"], found["test"], notes, directory.name)


def _streamed(config: DataConfig, tokenizer: Any, source: Source) -> Splits:
    """Stream the rows; nothing is cached. For train, the key covers only the names and sizes of the files."""
    train, held_out, notes = open_streamed(config, tokenizer, source)
    validation, test = (datasets.Dataset(_table(held_out[split])) for split in SPLITS[1:])
    seen = hashlib.sha256(b"".join(rows.tobytes() for split in SPLITS[1:] for rows in held_out[split].input_ids))
    for note in notes:
        logger.info(note)
    key = _key(config, f"{source.fingerprint} {seen.hexdigest()}", tokenizer, pairs=False)
    return Splits(train, validation, test, notes, key)


def _is_whole(directory: Path) -> bool:
    """Return whether the rows in directory are, byte for byte, those that were written."""
    files = [directory / name for name in (*FILES, SUMS_FILE)]
    return all(path.is_file() for path in files) and files[-1].read_bytes() == _sums(directory).encode()


def _sums(directory: Path) -> str:
    return "".join(f"{sha256_of(directory / name)}  {name}\n" for name in FILES)


def _key(config: DataConfig, source: str, tokenizer: Any, *, pairs: bool) -> str:
    """Return the key of the rows, from configuration, content of the source, and tokenizer."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    said = dataclasses.asdict(config)
    for name, default in _LATER.items():
        if said[name] == default:
            del said[name]
    parts = [
        _FORMAT_OF_NAMED if set(config.every_source) <= set(NAMED) else FORMAT,
        said,
        source,
        vocabulary,
        type(tokenizer).__name__,
        tokenizer.chat_template,
        tokenizer.eos_token_id,
        pad_of(tokenizer),
        *(["pairs"] if pairs else []),
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:20]


def _write(rows: Rows, path: Path) -> None:
    """Write an Arrow stream, which datasets maps into memory instead of reading."""
    table = _table(rows)
    with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=1024)


def _table(rows: Rows) -> pyarrow.Table:
    columns = {
        "input_ids": _fixed(rows.input_ids, rows.length),
        "labels": _fixed(rows.labels, rows.length),
        "document": pyarrow.array(rows.document, pyarrow.int64()),
        "starts": pyarrow.array(rows.starts, pyarrow.list_(pyarrow.int32())),
    }
    if rows.source:
        columns["source"] = pyarrow.array(rows.source, pyarrow.string())
    return pyarrow.table(columns)


def _fixed(values: list[numpy.ndarray], length: int) -> pyarrow.Array:
    flat = numpy.concatenate(values) if values else numpy.empty(0, numpy.int32)
    return pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(flat), length)
