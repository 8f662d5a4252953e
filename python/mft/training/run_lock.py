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

LOCK = ".lock"
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)  # of a disk that cannot lock, as some of NFS
_MOST = 1000  # bytes of it that are shown


@contextlib.contextmanager
def hold(directory: Path, *, shared: bool = False) -> Iterator[None]:
    """Hold directory, made if need be, until the block ends; made for nothing, it goes again.

    shared: beside others that hold it so, and beside nobody else; on a disk without locks beside anybody.
    Raises: RuntimeError that names the process which holds it; OSError if nothing can be written there, or the lock is
        a symbolic link, through which another file would be emptied.
    """
    path = directory / LOCK
    missing = [parent for parent in (directory, *directory.parents) if not parent.exists()]
    while True:
        descriptor = _open(path)
        try:
            try:
                _lock(descriptor, shared)
            except BlockingIOError:
                holder = os.read(descriptor, _MOST).decode(errors="replace").strip() or "another process"
                raise RuntimeError(
                    f"output_dir {directory} is in use by {holder}: wait for it, stop it, or name another output_dir"
                ) from None
            if not _is_at(path, descriptor):  # its last holder has removed it: lock the one that lies there now
                continue
            try:
                _sign(descriptor, directory)
                yield
            finally:
                with contextlib.suppress(OSError):  # left behind, it holds nobody; of several the last removes it
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    path.unlink()
                    for parent in missing:
                        parent.rmdir()  # as far as they are empty
            return
        finally:
            os.close(descriptor)


def _lock(descriptor: int, shared: bool) -> None:
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as error:
        if not shared or error.errno not in _NO_LOCKS:
            raise


def _open(path: Path) -> int:
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _not_writable(path.parent, error) from error
        try:
            return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        except FileNotFoundError:  # another process had made the directory for nothing, and has just removed it
            continue
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise OSError(f"{path} must be a file of mft's own, got a symbolic link: remove it") from error
            raise _not_writable(path.parent, error) from error


def _sign(descriptor: int, directory: Path) -> None:
    """Write who holds it."""
    began = datetime.now().astimezone().isoformat(timespec="seconds")
    words = json.dumps({"process": os.getpid(), "host": socket.gethostname(), "since": began}) + "\n"
    try:
        os.truncate(descriptor, 0)
        os.pwrite(descriptor, words.encode(), 0)
    except OSError as error:
        raise _not_writable(directory, error) from error


def _not_writable(directory: Path, error: OSError) -> OSError:
    return OSError(
        f"output_dir must be writable, got {directory} ({error.strerror}): see that the disk has room and may be "
        "written to, or name another one"
    )


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except FileNotFoundError:
        return False
