"""What lies beside a patched file, FILE.undo: the bytes that the patch changed, and the SHA-256 of both files.

A safetensors file, which is read with suspicion. Its metadata are Facts; its tensors:

    segments  int64 (n, 3): the original is these pieces in turn (0: of the patched file, 1: of moved; start; bytes)
    moved     uint8: what the patched file does not hold: header and tensors that were widened
    gaps      uint8: from one changed byte of the original to the next; 255 skips as many, and changes none
    old       uint8: what these bytes were

The result must have the SHA-256 of the original, or nothing is written: whatever a damaged file says.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import safetensors.torch
import torch

from mft.files.json_file import check_keys, expect, parse_object
from mft.files.safetensors_file import open_tensors

SUFFIX = ".undo"
_VERSION = 1
_SKIP = 255  # of a gap: no byte is changed there
_KEY = "mft"
_REMEDY = "copy it again, or take the original from where it came from"
_PIECE = 1 << 24  # bytes that are copied at once
_TENSORS = {"segments": "I64", "moved": "U8", "gaps": "U8", "old": "U8"}


def undo_path(patched: str | os.PathLike) -> Path:
    """Where the undo file of a patched file lies."""
    path = Path(patched)
    return path.with_name(path.name + SUFFIX)


@dataclass(frozen=True)
class Facts:
    """What an undo file says besides bytes."""

    sha256_before: str
    sha256_after: str
    bytes_before: int
    masks: str  # their content_hash
    dropped: int  # weights
    version: int = _VERSION


@dataclass(frozen=True)
class Undo:
    """An undo file's content."""

    facts: Facts
    segments: np.ndarray
    moved: np.ndarray
    places: np.ndarray  # int64, ascending: which bytes of the original were changed
    old: np.ndarray  # uint8: what they were

    def to_bytes(self) -> bytes:
        tensors = {
            "segments": torch.from_numpy(self.segments.astype(np.int64)),
            "moved": torch.from_numpy(self.moved),
            "gaps": torch.from_numpy(_gaps(self.places)),
            "old": torch.from_numpy(self.old),
        }
        return safetensors.torch.save(tensors, {_KEY: json.dumps(asdict(self.facts))})

    @property
    def is_in_order(self) -> bool:
        """Whether the patched file differs from the original in the changed bytes alone."""
        return self.segments.tolist() == [[0, 0, self.facts.bytes_before]]

    def restore(self, patched: Path, sink: BinaryIO | None = None) -> None:
        """Write the original, made of a patched file, to sink, if there is one.

        Raises: ValueError if it is not the original; what has been written must then be thrown away.
        """
        digest, written = hashlib.sha256(), 0
        with patched.open("rb") as source:
            for piece in self._pieces(source):
                first, last = np.searchsorted(self.places, [written, written + len(piece)])
                piece[self.places[first:last] - written] = self.old[first:last]
                digest.update(piece.data)
                written += len(piece)
                if sink is not None:
                    sink.write(piece.data)
        if digest.hexdigest() != self.facts.sha256_before:
            raise ValueError(
                f"{patched} must be the patched file, whose undo gives SHA-256 {self.facts.sha256_before}, got "
                f"{digest.hexdigest()}: it, or {undo_path(patched).name}, has been changed since; {_REMEDY}"
            )

    def _pieces(self, source: BinaryIO) -> Iterator[np.ndarray]:
        for where, start, size in self.segments.tolist():
            if where:
                yield self.moved[start : start + size].copy()
                continue
            source.seek(start)
            for place in range(0, size, _PIECE):
                piece = np.fromfile(source, np.uint8, min(size - place, _PIECE))
                yield piece
                if len(piece) < min(size - place, _PIECE):
                    return  # cut off, which the hash will tell


def read_undo(patched: str | os.PathLike) -> Undo:
    """The undo file of a patched file.

    Raises: FileNotFoundError; ValueError that names the undo file, if it is damaged or none.
    """
    path = undo_path(patched)
    if not path.exists():
        raise FileNotFoundError(
            f"{path}: the undo file that mft patch writes must lie beside {patched}, got nothing there: move it there"
        )
    with open_tensors(path, _REMEDY) as file:
        metadata = file.metadata() or {}
        expect(path, "its metadata", sorted(metadata), _KEY in metadata, f"an undo file's, with the key {_KEY!r}")
        facts = _facts(path, parse_object(metadata[_KEY].encode(), path))
        declared = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
        expect(path, "its tensors", declared, declared == _TENSORS, f"{_TENSORS}")
        found = {name: file.get_tensor(name).numpy() for name in _TENSORS}
    segments, gaps, old = found["segments"], found["gaps"], found["old"]
    expect(path, "segments", segments.shape, segments.ndim == 2 and segments.shape[1:] == (3,), "of shape (n, 3)")
    _check_segments(path, segments, facts.bytes_before, len(found["moved"].reshape(-1)))
    steps = gaps.reshape(-1).astype(np.int64)
    places = np.cumsum(steps)[steps != _SKIP]
    expect(path, "gaps", len(places), len(places) == old.size, f"of {old.size} bytes")
    inside = not len(places) or places[-1] < facts.bytes_before
    expect(path, "gaps", int(places[-1]) if len(places) else 0, inside, f"within {facts.bytes_before} bytes")
    return Undo(facts, segments, found["moved"].reshape(-1), places, old.reshape(-1))


def _facts(path: Path, values: dict[str, Any]) -> Facts:
    known = list(Facts.__dataclass_fields__)
    expect(path, "version", values.get("version"), values.get("version") == _VERSION, f"{_VERSION}, or upgrade mft")
    check_keys(path, values, known)
    for key, kind in Facts.__annotations__.items():
        expect(path, key, values[key], type(values[key]) is kind, {int: "an int", str: "a string"}[kind])
    size = values["bytes_before"]
    expect(path, "bytes_before", size, 0 <= size < 1 << 62, "a file's size")
    return Facts(**values)


def _check_segments(path: Path, segments: np.ndarray, size: int, moved: int) -> None:
    total = 0
    for where, start, count in segments.tolist():
        holds = where in (0, 1) and start >= 0 and count >= 0 and (where == 0 or start + count <= moved)
        expect(path, "segments", (where, start, count), holds, "pieces of the patched file and of what was moved")
        total += count
    expect(path, "segments", total, total == size, f"of {size} bytes together")


def _gaps(places: np.ndarray) -> np.ndarray:
    """uint8: ascending places as steps from one to the next, the first from 0."""
    skips, rest = np.divmod(np.diff(places, prepend=0), _SKIP)
    ends = np.cumsum(skips + 1)
    gaps = np.full(ends[-1] if len(ends) else 0, _SKIP, np.uint8)
    gaps[ends - 1] = rest
    return gaps
