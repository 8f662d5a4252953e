"""Write directories and files whole or not at all: write next to the target, sync, then rename.

A killed writer may leave .TARGET.RANDOM.tmp next to its target, or .TARGET.RANDOM.old, which is the target that was
there before. sweep() removes them.
"""

import contextlib
import errno
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS)  # from FAT, some network disks and mounted buckets
_SCRATCH = re.compile(r"\.(.+)\.[a-z0-9_]{8}\.(?:tmp|old)")


class NotWritten(OSError):
    """A file or directory could not be written or deleted; the message names it, which a failed write(2) does not."""


@contextmanager
def convert_disk_errors(target: str | os.PathLike, what: str = "written") -> Iterator[None]:
    """Turn disk errors in the block into a NotWritten that names target."""
    try:
        yield
    except NotWritten:
        raise
    except (OSError, SafetensorError) as error:  # safetensors raises SafetensorError for every failure
        reason = getattr(error, "strerror", None) or error
        raise NotWritten(
            f"{target} could not be {what} ({reason}): see that the disk has room and may be written to"
        ) from error


@contextmanager
def atomic_directory(target: str | os.PathLike, *, replace: Callable[[], bool] = lambda: True) -> Iterator[Path]:
    """Yield an empty directory that becomes target if the block succeeds, and is deleted if it fails.

    replace: asked at the end if target exists: whether ours replaces it, or is deleted. Raises: NotWritten.
    """
    target = Path(target)
    with convert_disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
        try:
            yield scratch
            for path in (scratch, *scratch.rglob("*")):
                _open_to_readers(path, 0o777 if path.is_dir() else 0o666)
            for path in (*scratch.rglob("*"), scratch):
                _sync(path)
            _move_into_place(scratch, target, replace)
            _sync(target.parent)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def atomic_file(target: str | os.PathLike) -> Iterator[Path]:
    """Yield the path of a file that becomes target if the block succeeds, else is deleted. Raises: NotWritten."""
    target = Path(target)
    with convert_disk_errors(target), _scratch_file(target) as scratch:
        yield scratch
        _open_to_readers(scratch, 0o666)
        _sync(scratch)
        scratch.replace(target)
        _sync(target.parent)


def write_whole(target: str | os.PathLike, content: str | bytes) -> None:
    """Write content to target, text as UTF-8, unless the file already has this content. Raises: NotWritten."""
    target = Path(target)
    content = content.encode() if isinstance(content, str) else content
    with convert_disk_errors(target):
        if target.is_file() and target.read_bytes() == content:
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(target) as scratch:
            scratch.write_bytes(content)


def publish(target: str | os.PathLike, content: str | bytes) -> bool:
    """Write content to target unless target exists, and return whether the file there is ours.

    If several writers race, also on several machines, exactly one gets True.
    Raises: NotWritten, also if the disk has no hard links.
    """
    target = Path(target)
    content = content.encode() if isinstance(content, str) else content
    with convert_disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with _scratch_file(target) as scratch:
            scratch.write_bytes(content)
            _open_to_readers(scratch, 0o666)
            _sync(scratch)
            return place(scratch, target)


def place(source: Path, target: Path) -> bool:
    """Move a file on the same disk to target unless it exists. Return whether it was moved. Raises: NotWritten."""
    with convert_disk_errors(target):
        try:
            os.link(source, target)
        except FileExistsError:
            # NFS may repeat a request whose answer was lost: then the existing file is our own.
            ours = target.exists() and os.path.samefile(source, target)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            raise NotWritten(
                f"{target} must be on a disk with hard links, which decide which of several writers wins, got "
                f"{error.strerror}: name a directory on another disk"
            ) from error
        else:
            ours = True
            _sync(target.parent)
        source.unlink()
        return ours


def place_directory(source: Path, target: Path) -> bool:
    """Rename source to target, or delete it if target exists; return whether it is ours. Raises: NotWritten."""
    with convert_disk_errors(target):
        try:
            source.rename(target)  # fails if target is a directory that is not empty
        except OSError:
            if not target.is_dir():
                raise
            shutil.rmtree(source)
            return False
        _sync(target.parent)
        return True


def remove(path: Path) -> None:
    """Delete a file or a directory. A half-deleted directory is never visible under its name. Raises: NotWritten."""
    with convert_disk_errors(path, "deleted"):
        if path.is_dir() and not path.is_symlink():
            scratch = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
            path.rename(scratch)
            shutil.rmtree(scratch)
        else:
            path.unlink()


def target_of(name: str) -> str | None:
    """Return the target of a scratch file or directory called name, or None if name is not a scratch name."""
    found = _SCRATCH.fullmatch(name)
    return found and found.group(1)


def sweep(directory: Path, ours: Callable[[str], object]) -> None:
    """Delete what killed writers left for targets whose names satisfy ours, and restore targets about to be replaced.

    No process may be writing there. Raises: NotWritten.
    """
    for entry in list(directory.iterdir()):
        name = target_of(entry.name)
        if name is None or not ours(name):
            continue
        target = entry.with_name(name)
        with convert_disk_errors(entry, "deleted"):
            if entry.suffix == ".old" and not target.exists():
                entry.rename(target)
            elif entry.is_dir():
                shutil.rmtree(entry)
            else:
                entry.unlink()


@contextmanager
def _scratch_file(target: Path) -> Iterator[Path]:
    """Yield the path of a new file next to target. It is deleted at the end if it is still there."""
    descriptor, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
    os.close(descriptor)
    scratch = Path(name)
    try:
        yield scratch
    finally:
        with contextlib.suppress(OSError):  # an error from the block says more
            scratch.unlink(missing_ok=True)


def _move_into_place(scratch: Path, target: Path, replace: Callable[[], bool]) -> None:
    if not target.exists():
        try:
            scratch.rename(target)
            return
        except OSError:
            if not target.is_dir():  # a real failure, not a race with another writer
                raise
    if not replace():
        return
    old = scratch.with_suffix(".old")
    target.rename(old)
    try:
        scratch.rename(target)
    except OSError:
        old.rename(target)  # restoring the old content matters more than the clean-up
        raise
    shutil.rmtree(old)


def _open_to_readers(scratch: Path, mode: int) -> None:
    """Give scratch the access that the umask allows: tempfile and safetensors give access to the owner only."""
    umask = os.umask(0)
    os.umask(umask)
    scratch.chmod(mode & ~umask)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
