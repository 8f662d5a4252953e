"""The one door to files that a stranger may have written: regular files alone, and of at most so many bytes."""

import io
import os
import stat
from pathlib import Path

_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def open_regular(path: Path) -> io.BufferedReader:
    """The file's bytes.

    Raises: ValueError that names it, if it is a pipe, a device, or what else may never end; OSError.
    """
    check_regular(path)
    # It may have become a pipe since: without O_NONBLOCK, opening one waits for a writer, who may never come.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        _check_mode(path, os.fstat(descriptor).st_mode)
    except ValueError:
        os.close(descriptor)
        raise
    return os.fdopen(descriptor, "rb")


def read_regular(path: Path, most: int) -> bytes:
    """The bytes of a file of at most so many. Raises: as open_regular, ValueError for a larger one too."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise ValueError(f"{path}: expected at most {most} bytes, got {size}")
        return file.read(size)


def check_regular(path: Path) -> None:
    """For libraries that open a path themselves. Raises: ValueError if it is no regular file; OSError."""
    _check_mode(path, path.stat().st_mode)


def _check_mode(path: Path, mode: int) -> None:
    kind = stat.S_IFMT(mode)
    if kind != stat.S_IFREG:
        got = _KINDS.get(kind, "something else")
        raise ValueError(f"{path}: expected a regular file, got {got}: put the file itself there")
