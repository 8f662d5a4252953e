"""Open untrusted files safely: only regular files, and only up to a given size."""

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
    """Open a regular file for reading bytes. Raises: ValueError if it is a pipe or device, which may never end."""
    check_regular(path)
    # The file may have become a pipe since: without O_NONBLOCK, open waits for a writer, which may never come.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        _check_mode(path, os.fstat(descriptor).st_mode)
    except ValueError:
        os.close(descriptor)
        raise
    return os.fdopen(descriptor, "rb")


def read_regular(path: Path, most: int) -> bytes:
    """Return the bytes of a file. Raises: as open_regular, and ValueError if the file has more than `most` bytes."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise ValueError(f"{path}: expected at most {most} bytes, got {size}")
        return file.read(size)


def check_regular(path: Path) -> None:
    """Check a path that a library will open itself. Raises: ValueError if it is not a regular file; OSError."""
    _check_mode(path, path.stat().st_mode)


def is_at(path: Path, descriptor: int) -> bool:
    """Whether path names the file that is open as descriptor, which others may have deleted or replaced."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except FileNotFoundError:
        return False


def _check_mode(path: Path, mode: int) -> None:
    kind = stat.S_IFMT(mode)
    if kind != stat.S_IFREG:
        got = _KINDS.get(kind, "something else")
        raise ValueError(f"{path}: expected a regular file, got {got}: put the file itself there")
