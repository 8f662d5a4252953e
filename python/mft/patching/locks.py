"""Locks so that only one process at a time changes a file. The system releases them when the process dies."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from mft.checks import nearest_path
from mft.files.atomic import convert_disk_errors
from mft.files.regular_file import check_regular, is_at


def check_there(path: Path) -> None:
    """Raise FileNotFoundError if there is no file, ValueError if it is no regular file."""
    if not path.exists():
        raise FileNotFoundError(f"{path} must be a GGUF file that exists, got nothing there{nearest_path(path)}")
    check_regular(path)


def check_new(target: Path) -> None:
    """Raise ValueError if there is anything at the path of an output."""
    if os.path.lexists(target):
        raise ValueError(f"output must be a new file, got {target}, which exists: name another one, or delete it")


@contextlib.contextmanager
def lock_for_reading(path: Path) -> Iterator[None]:
    """Keep other processes from patching the file in place meanwhile. Raises: RuntimeError if one is at it; OSError."""
    with _locked(path, os.O_RDONLY, fcntl.LOCK_SH):
        yield


@contextlib.contextmanager
def lock_for_changing(path: Path) -> Iterator[None]:
    """Keep other patches from reading or changing the file meanwhile. Raises: RuntimeError if one is at it; OSError."""
    with _locked(path, os.O_RDWR, fcntl.LOCK_EX):
        yield


@contextlib.contextmanager
def claim(path: Path) -> Iterator[BinaryIO]:
    """Yield a new file of ours, deleted on failure. Raises: RuntimeError or ValueError if it is taken; OSError."""
    while True:
        with _locked(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, fcntl.LOCK_EX) as descriptor:
            if not is_at(path, descriptor):  # its last holder has deleted it
                continue
            if os.fstat(descriptor).st_size:  # a killed process leaves an empty file
                raise ValueError(
                    f"{path} must not exist, got an undo file without the patched file: delete it if a patch was "
                    "killed here; if the patched file was moved, move this one to it"
                )
            try:
                with os.fdopen(descriptor, "wb", closefd=False) as file:
                    yield file
            except BaseException:
                path.unlink(missing_ok=True)
                raise
        return


@contextlib.contextmanager
def _locked(path: Path, flags: int, kind: int) -> Iterator[int]:
    if not flags & os.O_CREAT:
        check_there(path)
    with convert_disk_errors(path, "opened"):
        descriptor = os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK, 0o666)
    try:
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RuntimeError(f"{path} must be free, got one that another mft patch works on: wait for it") from None
        yield descriptor
    finally:
        os.close(descriptor)
