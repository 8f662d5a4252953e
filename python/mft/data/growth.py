"""How far a packed file may grow in memory: as much as a small file may need, else so many times its own bytes.

A few hundred bytes of parquet or gzip may stand for gigabytes. Texts in .gz grow 3- to 20-fold, and to 100-fold where
rows are a few characters each, since Python takes some hundred bytes for a row. Parquet holds what rows have in common
once: chats of ten characters below one system prompt of 2000 grow 300-fold.
"""

from pathlib import Path

LEAST = 2**28  # bytes in memory that any file may take
TIMES = {".gz": 300, ".parquet": 1000}  # and beyond these, so many times its bytes on disk
_ROW = 300  # bytes of a row in memory: a dictionary, its text's head, the line's number
_MARK = 64  # bytes that Python takes at most for a value, a bracket or a comma of JSON


def bytes_of_line(line: bytes) -> int:
    """What a line of JSON or CSV takes in memory once it is parsed, or more."""
    return len(line) + _ROW + _MARK * sum(line.count(mark) for mark in (b"{", b"[", b",", b":"))


def check_growth(path: Path, held: int) -> None:
    """Raise ValueError if so many bytes are more than the file may take at once."""
    times = TIMES[path.suffix]
    if held > LEAST and held > times * (size := path.stat().st_size):
        raise ValueError(
            f"{path}: what is held of a file at once must take at most {LEAST} bytes of memory, or {times} times the "
            f"file's own, got {held} or more of a file of {size}: if its rows are right, unpack it, or write it with "
            "less compression and smaller row groups and set data.streaming=true"
        )
