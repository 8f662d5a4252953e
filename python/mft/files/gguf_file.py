"""A GGUF file that a stranger may have written: what its header claims is held against its bytes before it is loaded.

    magic, version, counts | key, type, value; ... | name, dimensions, type, offset; ... | padding | tensors' bytes

(ggml's docs/gguf.md.) Readers of it believe the counts: of a damaged file transformers makes blocks without end.
"""

import math
import mmap
import os
import struct
from pathlib import Path
from typing import Any

from gguf.constants import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT, GGUFValueType

from mft.files.cursor import Cursor, Damaged
from mft.files.regular_file import open_regular

MAGIC = b"GGUF"
_VERSIONS = (2, 3)  # 1 counted in 32 bits, and is gone
_SHORTEST = 24  # bytes of magic, version and counts
_MOST_DIMENSIONS = 4  # of ggml
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


def check_gguf(path: Path) -> None:
    """Raise ValueError, naming the file and what is wrong, unless all that its header names lies in it; OSError."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size < _SHORTEST:
            raise _error(path, f"{size} bytes")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            try:
                _check(Cursor(content))
            except Damaged as error:
                raise _error(path, str(error)) from None


def _error(path: Path, problem: str) -> ValueError:
    return ValueError(f"{path}: expected a GGUF file, got one with {problem}: damaged or cut off, copy it again")


def _check(cursor: Cursor) -> None:
    magic, version, tensors, pairs = cursor.numbers("4sIQQ")
    if magic != MAGIC or version not in _VERSIONS:
        raise Damaged(f"magic {magic!r} and version {version}, which must be {MAGIC!r} and 2 or 3")
    metadata: dict[str, Any] = {}
    for _ in range(pairs):
        key = cursor.text()
        if key in metadata:
            raise Damaged(f"the key {key[:80]!r} twice")
        metadata[key] = _value(cursor)
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str):
        raise Damaged(f"general.architecture {architecture!r}, which must be a text")
    alignment = metadata.get("general.alignment", GGUF_DEFAULT_ALIGNMENT)
    if type(alignment) is not int or alignment < 1 or alignment.bit_count() != 1:
        raise Damaged(f"general.alignment {alignment!r}, which must be a power of two")
    names = _check_tensors(cursor, tensors, alignment)
    found = {name.split(".")[1] for name in names if name.startswith("blk.")}
    blocks = metadata.get(f"{architecture}.block_count")
    if type(blocks) is not int or blocks != len(found):  # transformers makes as many as it says
        raise Damaged(f"{architecture}.block_count {blocks!r} beside the tensors of {len(found)} blocks")


def _value(cursor: Cursor) -> Any:
    """A number or a text; of an array its length."""
    kind = cursor.number("I")
    if kind in _FORMS:
        return cursor.number(_FORMS[kind])
    if kind == GGUFValueType.STRING:
        return cursor.text()
    if kind != GGUFValueType.ARRAY:
        raise Damaged(f"a value of type {kind} at byte {cursor.place}, which there is not")
    kind, length = cursor.numbers("IQ")
    if kind in _FORMS:
        cursor.skip(length * struct.calcsize(f"<{_FORMS[kind]}"))
    elif kind == GGUFValueType.STRING:
        for _ in range(length):
            cursor.skip(cursor.number("Q"))
    else:
        raise Damaged(f"an array of type {kind} at byte {cursor.place}, which must be of numbers or texts")
    return length


def _check_tensors(cursor: Cursor, count: int, alignment: int) -> set[str]:
    """The tensors' names."""
    ends, total = 0, 0
    names: set[str] = set()
    for _ in range(count):
        name, dimensions = cursor.text(), cursor.number("I")
        if name in names:
            raise Damaged(f"the tensor {name[:80]!r} twice")
        names.add(name)
        if not 0 < dimensions <= _MOST_DIMENSIONS:
            raise Damaged(f"{dimensions} dimensions of {name[:80]!r}, which must be 1 to {_MOST_DIMENSIONS}")
        shape = cursor.numbers(f"{dimensions}Q")
        kind, offset = cursor.numbers("IQ")
        if kind not in GGML_QUANT_SIZES:
            raise Damaged(f"the type {kind} of {name[:80]!r}, which there is not")
        values, stored = GGML_QUANT_SIZES[kind]
        if not math.prod(shape) or shape[0] % values:
            raise Damaged(f"the shape {shape} of {name[:80]!r}, whose rows are of {values} values at a time")
        size = math.prod(shape) // values * stored
        ends, total = max(ends, offset + size), total + size
    cursor.skip(-cursor.place % alignment)
    left = len(cursor.content) - cursor.place
    if max(ends, total) > left:
        raise Damaged(f"{max(ends, total)} bytes of tensors, where {left} are left")
    return names
