"""Open sources of examples (built in, a file, a directory, a Hub id) as records of three splits."""

import hashlib
import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets

from mft.checks import nearest, nearest_path
from mft.config import DataConfig
from mft.data.corpora import describe_headers, describe_stdlib, header_files, stdlib_files
from mft.data.docstrings import docstring_chats
from mft.data.formats import CONTENT_COLUMNS, FORMS, content_of, find_form
from mft.data.problems import PROBLEM_SUBSETS, describe_problems, fingerprint_of, make_problems
from mft.data.record_files import ARRAY, FILE_TYPES, TYPES, Records, find_splits, hash_splits, read_files, type_of
from mft.data.record_streams import RecordStream, stream_files, stream_hub, stream_records
from mft.data.reserve import RESERVE, RESERVED_SOURCE, find_reserved
from mft.files.cache import sha256_of
from mft.files.hub import hub_is_reachable

SPLITS = ("train", "validation", "test")
NAMED = ("stdlib", "docstrings", "headers", "problems")  # sources that every machine has
STDLIB_SUBSETS = ("pretrain", "finetune")  # about 60 % and 40 % of the training files
_KEYS = {"train": "split", "validation": "validation_split"}  # keys of data that name a source's split
_SHARES = ("validation_share", "test_share")
_WHOLE_LIBRARY = "install the interpreter's whole library"
MINIMUM_FILES = 20  # in each split of an installed corpus, so that a standard error over files is meaningful
HELD_OUT = 8  # minimum examples split off for validation and for test; with fewer than 40 examples, a fifth


@dataclass
class Source:
    """The records of the three splits, loaded on demand. fingerprint identifies all of their content.

    hash computes the fingerprint again, if others may change the files meanwhile.
    parts: the sources of a mix by name; a mix itself loads nothing.
    streams: for a source that is read during training; fingerprint then covers only names and sizes.
    reserved: by split, the documents that a run reads only if it asks for them (see reserve.py).
    counts_padding: whether padding counts for data.max_eval_tokens, as in the stored studies of problems.
    """

    fingerprint: str
    load: Callable[[], dict[str, Records]]
    notes: list[str] = field(default_factory=list)
    hash: Callable[[], str] | None = None
    parts: dict[str, "Source"] = field(default_factory=dict)
    streams: dict[str, RecordStream] = field(default_factory=dict)
    reserved: dict[str, frozenset[int]] = field(default_factory=dict)
    counts_padding: bool = False

    def open_streams(self) -> dict[str, RecordStream]:
        """Return the streams of the available splits. A source that is in memory, such as a corpus, has all three."""
        return self.streams or {split: stream_records(records) for split, records in self.load().items()}

    def check(self) -> None:
        """Raise ValueError if the data may have changed since the fingerprint was computed."""
        for part in self.parts.values():
            part.check()
        if self.hash is not None and self.hash() != self.fingerprint:
            raise ValueError(
                "data.source must stay as it is while it is read, got files that changed meanwhile: begin again when "
                "they are written"
            )


def form_of(records: Records) -> str:
    """Return the form of records: the first of FORMS whose columns they have."""
    columns = set(records.columns)
    if (form := find_form(columns)) is not None:
        return form
    half = next((column for form in FORMS.values() for column in form.needs if column in columns), None)
    close = next(filter(None, (nearest(column, CONTENT_COLUMNS) for column in sorted(columns))), "")
    remedy = f"{half} needs its other half" if half else f"rename or convert them{close}"
    raise ValueError(
        f"{records.place(0)}: data must have a column messages or conversations, columns prompt and completion, "
        "instruction and output or question and answer, or a column text, got "
        f"{', '.join(sorted(columns)) or 'none'}: {remedy}"
    )


def open_source(config: DataConfig) -> Source:
    """Open config.source, or config.sources. Raises ValueError if data cannot be reached; it says what to do."""
    if config.sources is None:
        return _open(config)
    parts = {}
    for name in config.sources:
        with name_source(name):
            parts[name] = _open(config.source_config(name))
    fingerprints = json.dumps([[name, part.fingerprint] for name, part in parts.items()])
    return Source(hashlib.sha256(fingerprints.encode()).hexdigest(), dict, parts=parts)


@contextmanager
def name_source(name: str) -> Iterator[None]:
    """Make errors name the source in data.sources; "" means that there is only one source."""
    try:
        yield
    except ValueError as error:
        if not name:
            raise
        raise ValueError(f"data.sources.{name}: {error}") from error


def _open(config: DataConfig) -> Source:
    path = Path(config.source)
    if config.source == "stdlib":
        _check_named(config, STDLIB_SUBSETS, "the stdlib corpus", "is split by file hash", but=_SHARES)
        return _installed(config, stdlib_files(), describe_stdlib(), _WHOLE_LIBRARY)
    if config.source == "docstrings":
        return _docstrings(config)
    if config.source == "headers":
        _check_named(config, (RESERVE,), "the corpus of headers", "is split by file hash")
        remedy = "install a torch that has its include directory"
        return _installed(config, header_files(), describe_headers(), remedy)
    if config.source == "problems":
        return _problems(config)
    if path.is_file():
        return _single_file(path, config)
    if path.is_dir():
        return _directory(path, config)
    is_path = config.source.startswith((".", "/", "~")) or config.source.count("/") > 1
    if not is_path and not config.source.endswith((*FILE_TYPES, ".json", ".gz", "/")):
        return _hub(config)
    raise ValueError(
        f"data.source must be data that exists, got {config.source!r}: no such file or directory{nearest_path(path)}"
    )


def _installed(config: DataConfig, sources: dict[str, str], what: str, remedy: str) -> Source:
    """Return files that came with Python or a package as a source, one document per file."""
    rule = f"data.source {config.source!r} must give at least {MINIMUM_FILES} files per split, got"
    if len(sources) < MINIMUM_FILES * len(SPLITS):
        raise ValueError(f"{rule} {len(sources)} in all: {remedy}, or name other data")
    rows, paths = [{"text": text} for text in sources.values()], list(sources)
    everything = Records(rows, paths.__getitem__, ["text"], range(len(rows)))
    splits = _split_off(everything, dict(zip(SPLITS[1:], (config.validation_share, config.test_share))))
    part, held = "", find_reserved(list(sources.values())) if config.source == RESERVED_SOURCE else frozenset()
    left_out = dict.fromkeys(SPLITS[1:], held)
    if config.subset == RESERVE:
        splits["test"], left_out["test"] = everything.select(sorted(held)), frozenset()
        part = " (test is the reserve, files that no study has read)"
    elif config.subset is not None:
        train = splits["train"]  # the split uses other digits of these hashes
        digests = [hashlib.sha256(content_key(row, train.columns)).hexdigest()[8:16] for row in train.rows]
        first = config.subset == STDLIB_SUBSETS[0]
        splits["train"] = train.select([i for i, digest in enumerate(digests) if (int(digest, 16) % 10 < 6) == first])
        part = f" (train is the {config.subset} subset of the training files)"
    for split, records in splits.items():
        if len(records.rows) < MINIMUM_FILES:
            shares = " and ".join(f"data.{key} {getattr(config, key):g}" for key in _SHARES)
            raise ValueError(
                f"{rule} {len(records.rows)} for {split} with {shares}: {remedy}, change the shares, or name other data"
            )
    files = " / ".join(f"{len(records.rows)} {split}" for split, records in splits.items())
    digest = hashlib.sha256("\0".join(text for item in sources.items() for text in item).encode())
    note = f"{config.source}: {what}, split by file hash into {files} files{part}"
    return Source(digest.hexdigest(), lambda: splits, [note], reserved=left_out if held else {})


def _docstrings(config: DataConfig) -> Source:
    """Return chats about the library's functions. Each file lies in the same split as with the source stdlib."""
    _check_named(config, STDLIB_SUBSETS, "the corpus of docstrings", "is split by file hash", but=_SHARES)
    files = stdlib_files()
    chats = docstring_chats(files)
    source = _installed(
        config, {path: files[path] for path in chats}, f"chats from {describe_stdlib()}", _WHOLE_LIBRARY
    )
    by_file = list(chats.items())

    def chats_of(records: Records) -> Records:
        rows = [(number, row) for number in records.numbers for row in by_file[number][1]]
        numbers = [number for number, _ in rows]  # the chats of a file are one document
        return Records([row for _, row in rows], lambda i: by_file[numbers[i]][0], ["messages"], numbers)

    splits = {split: chats_of(records) for split, records in source.load().items()}
    source.load = lambda: splits
    return source


def _problems(config: DataConfig) -> Source:
    _check_named(config, PROBLEM_SUBSETS, "problems", "have three fixed splits")
    problems = make_problems(config.subset)

    def records_of(split: str) -> Records:
        rows, kinds = [one.row for one in problems[split]], [one.kind for one in problems[split]]
        # All problems of a kind are one document: one template makes them dependent.
        return Records(rows, lambda i: f"problems, {split} row {i}", ["prompt", "completion"], kinds)

    part = "" if config.subset is None else f" (train is the {config.subset} subset, half of each kind's problems)"
    notes = [describe_problems(problems) + part]
    fingerprint = fingerprint_of(problems)
    return Source(fingerprint, lambda: {split: records_of(split) for split in SPLITS}, notes, counts_padding=True)


def _check_named(
    config: DataConfig, subsets: Sequence[str], source: str, why: str, *, but: tuple[str, ...] = ()
) -> None:
    _check_defaults(config, f"{source} {why}", but=("subset", *but))
    subset = config.subset
    if subset not in (None, *subsets):
        raise ValueError(
            f"data.subset must be {', '.join(subsets)} or null for {source}, got {subset!r}"
            f"{nearest(str(subset), subsets)}"
        )


def _single_file(path: Path, config: DataConfig) -> Source:
    _check_defaults(
        config,
        f"the single file {path} has no splits, so name a directory with train and validation files",
        but=_SHARES,
    )
    if type_of(path) not in (*FILE_TYPES, ARRAY):
        raise ValueError(
            f"data.source must be a {ARRAY}, {TYPES} file if it is a file, got {path}: convert it; "
            'datasets.load_dataset("KIND", data_files=FILE, split="train").to_json("FILE.jsonl") reads many kinds'
        )
    if config.streaming:
        return _stream_of({"train": [path]}, {"train": "train"})
    source = Source(sha256_of(path), dict, hash=lambda: sha256_of(path))
    source.load = lambda: _complete({"train": read_files([path])}, config, source.notes)
    return source


def _directory(directory: Path, config: DataConfig) -> Source:
    """Open a directory of data files."""
    if config.subset is not None:
        raise ValueError(
            f"data.subset must be left out for a directory, because its card is not read, got {config.subset!r}: "
            "name the directory of that subset"
        )
    splits, left_out = find_splits(directory)
    chosen = _chosen_splits(splits, config)
    used = {name: splits[name] for name in map(_name_of, chosen.values())}
    if config.streaming:
        source = _stream_of(used, chosen)
    else:
        source = Source(hash_splits(used), dict, hash=lambda: hash_splits(used))
    if left_out:
        names = ", ".join(str(path.relative_to(directory)) for path in left_out[:3])
        source.notes.append(f"{config.source}: {len(left_out)} files name no split and were left out, such as {names}")

    source.load = lambda: _load(
        lambda name: read_files(used[name]), chosen, config, source.notes
    )  # but not of a stream
    return source


def _load(
    read: Callable[[str], Records], chosen: Mapping[str, str], config: DataConfig, notes: list[str]
) -> dict[str, Records]:
    """Read the source's splits that are chosen, and complete them."""
    available = {name: read(name) for name in map(_name_of, chosen.values())}
    return _complete(_select_splits(available, chosen), config, notes)


def _stream_of(files: Mapping[str, Sequence[Path]], chosen: Mapping[str, str]) -> Source:
    """Return a stream of the files of splits. Each of our splits is a whole split of the source."""
    lines = [f"{split} {path.name} {path.stat().st_size}" for split, paths in files.items() for path in paths]
    streams = {split: stream_files(files[name]) for split, name in chosen.items()}
    return Source(hashlib.sha256("\n".join(lines).encode()).hexdigest(), dict, streams=streams)


def _hub(config: DataConfig) -> Source:
    """Open a data set of the Hub, through the datasets library."""
    loaded = _load_from_hub(config)
    chosen = _chosen_splits(loaded, config)
    if config.streaming:
        words = f"{config.source} {config.subset} {chosen}"
        streams = {split: stream_hub(loaded[name], f"{config.source}, split {name}") for split, name in chosen.items()}
        return Source(hashlib.sha256(words.encode()).hexdigest(), dict, streams=streams)
    parts = [f"{split}={loaded[_name_of(text)]._fingerprint}" for split, text in chosen.items()]
    source = Source(hashlib.sha256(" ".join(parts).encode()).hexdigest(), dict)

    def records_of(name: str) -> Records:
        rows = loaded[name]
        return Records(rows, lambda i: f"{config.source}, split {name}, row {i}", rows.column_names, range(len(rows)))

    source.load = lambda: _load(records_of, chosen, config, source.notes)
    return source


def _load_from_hub(config: DataConfig) -> dict[str, Any]:
    """Load every split of the source: as a Dataset, or with streaming as an IterableDataset."""
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", config.source):
        raise ValueError(
            f"data.source must be {', '.join(NAMED)}, a {ARRAY}, {TYPES} file, a directory or a hub id, "
            f"got {config.source!r}"
        )
    online = hub_is_reachable()
    try:  # datasets raises StopIteration for an empty file
        with _offline(not online):
            loaded = datasets.load_dataset(config.source, config.subset, streaming=config.streaming)
    except (OSError, ValueError, StopIteration, datasets.exceptions.DatasetsError) as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        if online:
            reason = " ".join(str(cause).split())[:300] or "one of its files is empty"
            message = f"data.source {config.source!r} cannot be loaded: {reason}"
        else:
            message = (
                f"data.source {config.source!r} is neither {', '.join(NAMED)}, nor a file or directory here, nor in "
                "the local cache of datasets, and the hub cannot be reached: check the name and the network, "
                "or give a local file"
            )
        raise ValueError(message + nearest(config.source, NAMED)) from error
    return dict(loaded)


@contextmanager
def _offline(wanted: bool) -> Iterator[None]:
    """Make datasets believe that there is no network, if wanted, so that it uses its cache at once."""
    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = before or wanted
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def _name_of(expression: str) -> str:
    """Return "train" for "train[:1000]"."""
    return expression.partition("[")[0]


def _chosen_splits(names: Collection[str], config: DataConfig) -> dict[str, str]:
    """Map our splits to the source's splits (names) or parts of them, as data.split says: "train" or "train[:10%]"."""
    chosen = {"train": config.split}
    if config.validation_split is not None:
        chosen["validation"] = config.validation_split
    elif "validation" in names and config.split != "validation":
        chosen["validation"] = "validation"
    if "test" in names and "test" not in (config.split, config.validation_split):
        chosen["test"] = "test"
    for split, expression in chosen.items():
        if _name_of(expression) not in names:
            raise ValueError(
                f"data.{_KEYS[split]} must be one of {', '.join(names)}, got {expression!r}"
                f"{nearest(_name_of(expression), names)}"
            )
        if config.streaming and _name_of(expression) != expression:
            raise ValueError(
                f"data.{_KEYS[split]} must be a whole split with data.streaming, got {expression!r}: write that "
                "part into a file of its own"
            )
    return chosen


def _select_splits(available: Mapping[str, Records], chosen: Mapping[str, str]) -> dict[str, Records]:
    """Select the chosen splits. "train[:1000]" and "train[:10%]" are parts of a split."""
    cut = {}
    for split, expression in chosen.items():
        name = _name_of(expression)
        records = cut[split] = available[name]
        if name == expression:
            continue
        try:
            instruction = datasets.ReadInstruction.from_spec(expression).to_absolute({name: len(records.rows)})
        except (ValueError, AssertionError) as error:
            raise ValueError(
                f"data.{_KEYS[split]} must look like {name}, {name}[:1000] or {name}[:10%], got {expression!r}"
            ) from error
        cut[split] = records.select(range(instruction[0].from_, instruction[0].to))
    return cut


def _complete(records: dict[str, Records], config: DataConfig, notes: list[str]) -> dict[str, Records]:
    """Split off missing validation and test splits from train by content hash; see _split_off."""
    for split, found in records.items():
        if not len(found.rows):
            raise ValueError(f"data.source {config.source!r} must hold examples, got an empty {split} split")
        _check_alike(found)
    lacking = {split: getattr(config, f"{split}_share") for split in SPLITS[1:] if split not in records}
    shares = {split: share for split, share in lacking.items() if share}
    records = {**records, **(_split_off(records["train"], shares) if shares else {})}
    for split in lacking.keys() - shares.keys():
        records[split] = records["train"].select([])
    if shares:
        said = " and ".join(f"{100 * share:g} % for {split}" for split, share in shares.items())
        sizes = ", ".join(f"{len(records[split].rows)} for {split}" for split in SPLITS)
        notes.append(
            f"{config.source}: no {' and no '.join(shares)} split given, so about {said} was split off from train by "
            f"content hash, at least {HELD_OUT} examples or a fifth: examples are now {sizes}"
        )
    return {split: records[split] for split in SPLITS}


def _check_alike(records: Records) -> None:
    """Raise ValueError for the first record without the columns of the first example's form."""
    form = form_of(records)
    first = find_form(records.rows[0]) if isinstance(records.rows, list) else form  # a table's rows are alike
    if first is not None and first != form:
        needs = FORMS[first].needs
        for number, row in enumerate(records.rows):
            if not set(needs) <= row.keys():
                raise ValueError(
                    f"{records.place(number)}: must have {' and '.join(needs)}, as the first example has, got "
                    f"{', '.join(row) or 'none'}: put examples of another form into another file"
                )


def _split_off(records: Records, shares: Mapping[str, float]) -> dict[str, Records]:
    """Return train and a split for each share: of all hashes, and at least HELD_OUT examples if there are 40.

    The hash of a row is its place in [0, 1): test is read upwards from 0.9 (and on from 0), validation downwards. So
    neither depends on the other's share, nor on the order of rows, and equal rows fall into the same split. If a share
    is too few, more rows of train are taken: those with the smallest hashes for validation, the largest for test.
    """
    columns = content_of(records.columns)
    digests = [hashlib.sha256(content_key(row, columns)).hexdigest() for row in records.rows]
    distinct = sorted(set(digests))
    if len(distinct) <= len(shares):
        raise ValueError(
            f"data.source must have more than {len(shares)} different examples to split off "
            f"{' and '.join(shares)}, got {len(distinct)}: add examples, or give those splits"
        )
    # How far a hash is above 0.9, cyclic. With a share of a tenth, one decimal digit of the hash decides.
    above = {d: ((int(d[:8], 16) % 10 - 9) % 10 + int(d[16:24], 16) / 2**32) / 10 for d in distinct}
    groups = {
        split: {d for d in distinct if (above[d] < share if split == "test" else above[d] >= 1 - share)}
        for split, share in shares.items()
    }
    least = max(1, min(HELD_OUT, len(distinct) // 5))
    missing = {split: max(0, least - len(group)) for split, group in groups.items()}
    rest = [digest for digest in distinct if not any(digest in group for group in groups.values())]
    if len(rest) <= sum(missing.values()):  # otherwise nothing would be left to train on
        groups = {split: set(distinct[i * least : (i + 1) * least]) for i, split in enumerate(shares)}
    else:  # from the two ends, so that one more example moves few others
        for split, ordered in (("validation", rest), ("test", rest[::-1])):
            if split in groups:
                groups[split].update(ordered[: missing[split]])
    owner = {digest: split for split, group in groups.items() for digest in group}
    picked: dict[str, list[int]] = {"train": [], **{split: [] for split in shares}}
    for i, digest in enumerate(digests):
        picked[owner.get(digest, "train")].append(i)
    return {split: records.select(indices) for split, indices in picked.items()}


def content_key(row: dict[str, Any], columns: Sequence[str]) -> bytes:
    """Return a key that is equal for two rows with the same content; other columns, such as an id, do not count."""
    row = {key: row[key] for key in columns if key in row} or row
    return json.dumps(row, sort_keys=True, default=str).encode("utf-8", "surrogatepass")


def _check_defaults(config: DataConfig, why: str, *, but: tuple[str, ...] = ()) -> None:
    for key in ("subset", "split", "validation_split", *_SHARES):
        value = getattr(config, key)
        if value != getattr(DataConfig, key) and key not in but:
            raise ValueError(f"data.{key} must be left out for this source, got {value!r}: {why}")
