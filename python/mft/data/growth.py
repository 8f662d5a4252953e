"""Limit the growth of a compressed file in memory: to a fixed size for small files, else to a multiple of its size.

Texts in .gz grow 3- to 20-fold, and 100-fold if rows are a few characters each. Parquet stores content that rows share
only once: chats of ten characters after one system prompt of 2000 grow 300-fold.
"""

from pathlib import Path

LEAST = 2**28  # bytes of memory that any file may take
TIMES = {".gz": 300, ".parquet": 1000}  # beyond LEAST: memory as a multiple of the file's size on disk
_ROW = 300  # bytes of a row in memory: a dictionary, its text's head, the line's number
_MARK = 64  # upper bound of Python's bytes for a value, a bracket or a comma of JSON


def bytes_of_line(line: bytes) -> int:
    """Return an upper estimate of the memory that a line of JSON or CSV takes once it is parsed."""
    return len(line) + _ROW + _MARK * sum(line.count(mark) for mark in (b"{", b"[", b",", b":"))


def check_growth(path: Path, held: int) -> None:
    """Raise ValueError if ``held`` bytes are more than the file may take in memory at once."""
    times = TIMES[path.suffix]
    if held > LEAST and held > times * (size := path.stat().st_size):
        raise ValueError(
            f"{path}: the part of a file that is in memory at once must take at most {LEAST} bytes, or {times} times "
            f"the size of the file, got {held} bytes or more for a file of {size} bytes: if its rows are right, "
            "unpack it, or write it with less compression and smaller row groups and set data.streaming=true"
        )
