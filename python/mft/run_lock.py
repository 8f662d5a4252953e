"""One process at a time works in a run directory: a lock that names it, and that the system drops when it dies."""

import contextlib
import errno
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import TextIO

LOCK = ".lock"


@contextlib.contextmanager
def hold(directory: Path) -> Iterator[None]:
    """Hold directory, made if need be, until the block ends.

    Raises: RuntimeError that names the process which holds it; OSError if nothing can be written there, or the lock is
        a symbolic link, through which another file would be emptied.
    """
    path = directory / LOCK
    while True:
        with _open(path) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                holder = file.read().strip() or "another process"
                raise RuntimeError(
                    f"output_dir {directory} is in use by {holder}: wait for it, stop it, or name another output_dir"
                ) from None
            if not _is_at(path, file.fileno()):  # its last holder has removed it: lock the one that lies there now
                continue
            file.truncate(0)
            began = datetime.now().astimezone().isoformat(timespec="seconds")
            file.write(json.dumps({"process": os.getpid(), "host": socket.gethostname(), "since": began}) + "\n")
            file.flush()
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return


def _open(path: Path) -> TextIO:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        return open(descriptor, "a+", encoding="utf-8")
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OSError(f"{path} must be a file of mft's own, got a symbolic link: remove it") from error
        raise OSError(f"output_dir must be writable, got {path.parent} ({error.strerror}): name another one") from error


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except FileNotFoundError:
        return False
