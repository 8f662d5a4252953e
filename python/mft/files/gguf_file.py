"""Read the header of an untrusted GGUF file and compare its claims with the file's bytes before the file is loaded.

    magic, version, counts | key, type, value; ... | name, dimensions, type, offset; ... | padding | tensors' bytes

(ggml's docs/gguf.md.) Other readers trust the counts: from a damaged file, transformers makes blocks without end.
"""

import math
import mmap
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf.constants import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT, GGUFValueType

from mft.files.cursor import Cursor, Damaged
from mft.files.regular_file import open_regular

MAGIC = b"GGUF"
_VERSIONS = (2, 3)  # version 1 has counts of 32 bits and is not in use any more
_SHORTEST = 24  # bytes of magic, version and counts
_MOST_DIMENSIONS = 4  # ggml's limit
_FORMS = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT64: "d",
}


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of a file. The last dimension of its shape is the length of a row, as in torch."""

    name: str
    shape: tuple[int, ...]
    kind: int  # ggml's number of its type
    start: int  # where its bytes begin in the file
    size: int  # bytes
    entry: int  # where the header has its type, 4 bytes, and its offset, 8 bytes


@dataclass(frozen=True)
class GgufHeader:
    """What the header says. ``metadata`` has the values by key, and for an array only its length."""

    metadata: dict[str, Any]
    pairs: dict[str, tuple[int, int]]  # start and end of each key with its value; without arrays of texts
    tensors: dict[str, GgufTensor]
    data: int  # where the tensors' bytes begin

    @property
    def architecture(self) -> str:
        return self.metadata["general.architecture"]

    @property
    def alignment(self) -> int:
        return self.metadata.get("general.alignment", GGUF_DEFAULT_ALIGNMENT)


def read_gguf_header(path: Path) -> GgufHeader:
    """Return the header; all that it names lies within the file. Raises: ValueError that names the file; OSError."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size < _SHORTEST:
            raise _error(path, f"{size} bytes")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            try:
                return _read(Cursor(content))
            except Damaged as error:
                raise _error(path, str(error)) from None


def _error(path: Path, problem: str) -> ValueError:
    return ValueError(f"{path}: expected a GGUF file, got one with {problem}: damaged or cut off, copy it again")


def _read(cursor: Cursor) -> GgufHeader:
    magic, version, tensors, count = cursor.numbers("4sIQQ")
    if magic != MAGIC or version not in _VERSIONS:
        raise Damaged(f"magic {magic!r} and version {version}, which must be {MAGIC!r} and 2 or 3")
    metadata: dict[str, Any] = {}
    pairs: dict[str, tuple[int, int]] = {}
    for _ in range(count):
        start = cursor.place
        key = cursor.text()
        if key in metadata:
            raise Damaged(f"the key {key[:80]!r} twice")
        metadata[key], is_short = _value(cursor)
        if is_short:
            pairs[key] = (start, cursor.place)
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str):
        raise Damaged(f"general.architecture {architecture!r}, which must be a text")
    alignment = metadata.get("general.alignment", GGUF_DEFAULT_ALIGNMENT)
    if type(alignment) is not int or alignment < 1 or alignment.bit_count() != 1:
        raise Damaged(f"general.alignment {alignment!r}, which must be a power of two")
    found, data = _read_tensors(cursor, tensors, alignment)
    numbers = {name.split(".")[1] for name in found if name.startswith("blk.")}
    blocks = metadata.get(f"{architecture}.block_count")
    if type(blocks) is not int or blocks != len(numbers):  # transformers makes block_count blocks
        raise Damaged(f"{architecture}.block_count {blocks!r}, but the tensors of {len(numbers)} blocks")
    return GgufHeader(metadata, pairs, found, data)


def _value(cursor: Cursor) -> tuple[Any, bool]:
    """Return (value, is_short). An array's value is its length; is_short is False for an array of texts."""
    kind = cursor.number("I")
    if kind in _FORMS:
        return cursor.number(_FORMS[kind]), True
    if kind == GGUFValueType.STRING:
        return cursor.text(), True
    if kind != GGUFValueType.ARRAY:
        raise Damaged(f"a value of the unknown type {kind} at byte {cursor.place}")
    kind, length = cursor.numbers("IQ")
    if kind in _FORMS:
        cursor.skip(length * struct.calcsize(f"<{_FORMS[kind]}"))
        return length, True
    if kind != GGUFValueType.STRING:
        raise Damaged(f"an array of type {kind} at byte {cursor.place}, which must be of numbers or texts")
    cursor.skip_texts(length)
    return length, False


def _read_tensors(cursor: Cursor, count: int, alignment: int) -> tuple[dict[str, GgufTensor], int]:
    """Return (the tensors by name, the place where the tensors' bytes begin)."""
    found: dict[str, tuple[tuple[int, ...], int, int, int, int]] = {}
    for _ in range(count):
        name, dimensions = cursor.text(), cursor.number("I")
        if name in found:
            raise Damaged(f"the tensor {name[:80]!r} twice")
        if not 0 < dimensions <= _MOST_DIMENSIONS:
            raise Damaged(f"{dimensions} dimensions of {name[:80]!r}, which must be 1 to {_MOST_DIMENSIONS}")
        shape = cursor.numbers(f"{dimensions}Q")
        entry = cursor.place
        kind, offset = cursor.numbers("IQ")
        if kind not in GGML_QUANT_SIZES:
            raise Damaged(f"the unknown type {kind} of {name[:80]!r}")
        values, stored = GGML_QUANT_SIZES[kind]
        if not math.prod(shape) or shape[0] % values:
            raise Damaged(f"the shape {shape} of {name[:80]!r}, whose rows must hold a multiple of {values} values")
        found[name] = (shape[::-1], kind, offset, math.prod(shape) // values * stored, entry)
    data = cursor.place + -cursor.place % alignment
    left = len(cursor.content) - data
    needed = max([sum(size for *_, size, _ in found.values()), *(o + size for _, _, o, size, _ in found.values())])
    if needed > left:
        raise Damaged(f"{needed} bytes of tensors, where {max(left, 0)} are left")
    end, before = 0, ""
    for name, (_, _, offset, size, _) in sorted(found.items(), key=lambda item: item[1][2]):
        if offset < end:
            raise Damaged(f"the tensors {before[:80]!r} and {name[:80]!r} in the same bytes")
        end, before = offset + size, name
    return {
        name: GgufTensor(name, shape, kind, data + offset, size, entry)
        for name, (shape, kind, offset, size, entry) in found.items()
    }, data
