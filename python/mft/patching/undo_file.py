"""The undo file next to a patched file, FILE.undo: the bytes that the patch changed, and the SHA-256 of both files.

It is a safetensors file, and it is read as an untrusted one. Its metadata are Facts. Its tensors are:

    segments  int64 (n, 3): the original is these pieces in turn (0: of the patched file, 1: of moved; start; bytes)
    moved     uint8: bytes of the original that the patched file lacks: the header and tensors that were widened
    gaps      uint8: steps from one changed byte of the original to the next; 255 skips 255 bytes and changes none
    old       uint8: the original values of the changed bytes

The result must have the SHA-256 of the original. Otherwise nothing is written, whatever a damaged file says.
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
_SKIP = 255  # a gap of this value only skips: no byte is changed there
_KEY = "mft"
_REMEDY = "copy it again, or take the original from where it came from"
_PIECE = 1 << 24  # bytes that are copied at a time
_TENSORS = {"segments": "I64", "moved": "U8", "gaps": "U8", "old": "U8"}


def undo_path(patched: str | os.PathLike) -> Path:
    """Return the path of a patched file's undo file."""
    path = Path(patched)
    return path.with_name(path.name + SUFFIX)


@dataclass(frozen=True)
class Facts:
    """The metadata of an undo file."""

    sha256_before: str
    sha256_after: str
    bytes_before: int
    masks: str  # content_hash of the masks
    dropped: int  # weights
    version: int = _VERSION


@dataclass(frozen=True)
class Undo:
    """The content of an undo file."""

    facts: Facts
    segments: np.ndarray
    moved: np.ndarray
    places: np.ndarray  # int64, ascending: which bytes of the original were changed
    old: np.ndarray  # uint8: the original values of these bytes

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
        """Whether the patched file has every byte of the original in its place, except for the changed bytes."""
        return self.segments.tolist() == [[0, 0, self.facts.bytes_before]]

    def restore(self, patched: Path, sink: BinaryIO | None = None) -> None:
        """Restore the original, check its hash, and write it to sink, if given. Raises: ValueError: then discard it."""
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
                f"{patched} must be the patched file, from which the undo file restores SHA-256 "
                f"{self.facts.sha256_before}, got {digest.hexdigest()}: it, or {undo_path(patched).name}, has been "
                f"changed since; {_REMEDY}"
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
                    return  # the file is cut off; the hash check reports it


def read_undo(patched: str | os.PathLike) -> Undo:
    """Read the undo file of a patched file. Raises: FileNotFoundError; ValueError that names it, if it is damaged."""
    path = undo_path(patched)
    if not path.exists():
        raise FileNotFoundError(
            f"{path}: the undo file that mft patch writes must lie next to {patched}, got nothing there: move it there"
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
    total, moved = 0, found["moved"].size
    for where, start, count in segments.tolist():
        holds = where in (0, 1) and start >= 0 and count >= 0 and (where == 0 or start + count <= moved)
        expect(path, "segments", (where, start, count), holds, "pieces of the patched file and of what was moved")
        total += count
    expect(path, "segments", total, total == facts.bytes_before, f"of {facts.bytes_before} bytes together")
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


def _gaps(places: np.ndarray) -> np.ndarray:
    """Return ascending places as uint8 steps from one place to the next, the first step from 0."""
    skips, rest = np.divmod(np.diff(places, prepend=0), _SKIP)
    ends = np.cumsum(skips + 1)
    gaps = np.full(ends[-1] if len(ends) else 0, _SKIP, np.uint8)
    gaps[ends - 1] = rest
    return gaps
