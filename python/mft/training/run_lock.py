"""A lock for a run directory. It names the process that holds it, and the system releases it when that process ends."""

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from mft.files.regular_file import is_at

LOCK = ".lock"
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)  # errors of a disk that cannot lock, such as some NFS
_MOMENT = 1.0  # seconds; one that shares the lock holds it alone while it removes the file
_MOST = 1000  # bytes of the lock file that a message shows
ONE_OF_SEVERAL = "one of several: pass --join too, or wait for it"
WORKS_ALONE = "which works alone: wait for it, or stop it and pass --join to each"


@contextlib.contextmanager
def hold(directory: Path, *, shared: bool = False) -> Iterator[None]:
    """Lock directory until the block ends. The directory is made if needed, and removed again if it stays empty.

    shared: several processes may hold a shared lock at once; it always succeeds on a disk that cannot lock.
    Raises: RuntimeError, which names the process that holds the lock; OSError if the directory cannot be written, or if
        the lock is a symbolic link, because another file would then be emptied.
    """
    path = directory / LOCK
    missing = [parent for parent in (directory, *directory.parents) if not parent.exists()]
    while True:
        descriptor = _open(path)
        try:
            try:
                _lock(descriptor, shared)
            except BlockingIOError:
                raise RuntimeError(f"output_dir {directory} is in use by {_refusal(descriptor, shared)}") from None
            if not is_at(path, descriptor):  # its last holder has removed it: lock the present file
                continue
            try:
                _sign(descriptor, directory)
                yield
            finally:
                with contextlib.suppress(OSError):  # a file left behind locks nothing; the last holder removes it
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    path.unlink()
                    for parent in missing:
                        parent.rmdir()  # fails, and stops here, if it is not empty
            return
        finally:
            os.close(descriptor)


def _lock(descriptor: int, shared: bool) -> None:
    end = time.monotonic() + (_MOMENT if shared else 0.0)
    while True:
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= end:
                raise
            time.sleep(0.05)
        except OSError as error:
            if not shared or error.errno not in _NO_LOCKS:
                raise
            return
        else:
            return


def _refusal(descriptor: int, shared: bool) -> str:
    """Say which process holds the lock, and what to do."""
    words = os.read(descriptor, _MOST).decode(errors="replace").strip()
    try:
        holder = "process {process} on {host}".format_map(json.loads(words))
    except (ValueError, TypeError, LookupError):
        holder = words or "another process"
    if shared:
        return f"{holder}, {WORKS_ALONE}"
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return f"{holder}: wait for it, stop it, or name another output_dir"
    return f"{holder}, {ONE_OF_SEVERAL}"


def _open(path: Path) -> int:
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _unwritable_error(path.parent, error) from error
        try:
            return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        except FileNotFoundError:  # another process has just removed the directory, which it had left empty
            continue
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise OSError(f"{path} must be a file of mft's own, got a symbolic link: remove it") from error
            raise _unwritable_error(path.parent, error) from error


def _sign(descriptor: int, directory: Path) -> None:
    """Write into the lock file which process holds it."""
    began = datetime.now().astimezone().isoformat(timespec="seconds")
    words = json.dumps({"process": os.getpid(), "host": socket.gethostname(), "since": began}) + "\n"
    try:
        os.truncate(descriptor, 0)
        os.pwrite(descriptor, words.encode(), 0)
    except OSError as error:
        raise _unwritable_error(directory, error) from error


def _unwritable_error(directory: Path, error: OSError) -> OSError:
    return OSError(
        f"output_dir must be writable, got {directory} ({error.strerror}): see that the disk has room and may be "
        "written to, or name another one"
    )
