"""Open an untrusted safetensors file: its header is checked strictly before the library reads it.

If two tensors have the same name, the library silently keeps the last one.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors

from mft.files.json_file import parse_object
from mft.files.regular_file import open_regular

_LENGTH = 8  # bytes at the file's start that hold the length of its header
MOST_HEADER = 1 << 25  # bytes: 200,000 tensors, more than any published model has in one file


@contextmanager
def open_tensors(path: Path, remedy: str) -> Iterator[Any]:
    """Yield the file of safetensors.safe_open, on the CPU. Raises: ValueError with the remedy if damaged; OSError."""
    check_header(path, remedy)
    try:
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except safetensors.SafetensorError as error:
        raise _damaged(path, str(error), remedy) from None


def check_header(path: Path, remedy: str) -> int:
    """Return the number of tensors. Raises: ValueError unless the header is a JSON object with unique names."""
    with open_regular(path) as file:
        length = int.from_bytes(file.read(_LENGTH), "little")
        size = os.fstat(file.fileno()).st_size
        if size < _LENGTH or length > size - _LENGTH:
            raise _damaged(path, f"a header of {length} bytes", remedy)
        if length > MOST_HEADER:
            raise ValueError(f"{path}: expected a header of at most {MOST_HEADER} bytes, got {length}")
        return len(parse_object(file.read(length), path).keys() - {"__metadata__"})


def _damaged(path: Path, reason: str, remedy: str) -> ValueError:
    size = path.stat().st_size
    return ValueError(
        f"{path}: expected a safetensors file, got {size} bytes that are damaged or cut off ({reason}): {remedy}"
    )
