"""Directories and files that appear whole or not at all: written beside the target, synced, then renamed.

What a killed writer leaves beside its target has a name of its own, .TARGET.RANDOM.tmp, or .old of what was there
before; sweep() clears it away.
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

_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS)  # of FAT, of some network disks, of buckets that are mounted
_SCRATCH = re.compile(r"\.(.+)\.[a-z0-9_]{8}\.(?:tmp|old)")


class NotWritten(OSError):
    """A file or directory could not be written or deleted; the message names it, which a failed write(2) does not."""


@contextmanager
def naming(target: str | os.PathLike, what: str = "written") -> Iterator[None]:
    """Errors of the disk while target is written, or deleted, become a NotWritten that names target."""
    try:
        yield
    except NotWritten:
        raise
    except (OSError, SafetensorError) as error:  # safetensors has but this one, whatever has failed
        reason = getattr(error, "strerror", None) or error
        raise NotWritten(
            f"{target} could not be {what} ({reason}): see that the disk has room and may be written to"
        ) from error


@contextmanager
def atomic_directory(target: str | os.PathLike, *, replace: bool = True) -> Iterator[Path]:
    """Yield an empty directory that becomes target when the block ends well, and vanishes when it does not.

    With replace=False a target that another process finished first stays, and ours is dropped: both hold the same.
    Raises: NotWritten.
    """
    target = Path(target)
    with naming(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
        try:
            yield scratch
            for path in (scratch, *scratch.rglob("*")):
                _open_to_readers(path, 0o777 if path.is_dir() else 0o666)
            _sync_tree(scratch)
            _move_into_place(scratch, target, replace)
            _sync(target.parent)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def atomic_file(target: str | os.PathLike) -> Iterator[Path]:
    """Yield a path; what is written there becomes target when the block ends well, and vanishes when it does not.

    Raises: NotWritten.
    """
    target = Path(target)
    with naming(target):
        descriptor, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
        os.close(descriptor)
        scratch = Path(name)
        try:
            yield scratch
            _open_to_readers(scratch, 0o666)
            _sync(scratch)
            scratch.replace(target)
            _sync(target.parent)
        finally:
            with contextlib.suppress(OSError):  # the error that brought us here says more
                scratch.unlink(missing_ok=True)


def write_whole(target: str | os.PathLike, content: str | bytes) -> None:
    """A file of this content, in UTF-8 if it is text; one that holds it already is not touched. Raises: NotWritten."""
    target = Path(target)
    content = content.encode() if isinstance(content, str) else content
    with naming(target):
        if target.is_file() and target.read_bytes() == content:
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(target) as scratch:
            scratch.write_bytes(content)


def publish(target: str | os.PathLike, content: str | bytes) -> bool:
    """Write a file of this content unless target is there, and tell whether it is ours.

    Of any number of writers on any number of machines that share the disk one is told True, and its file stays.
    Raises: NotWritten, also where the disk has no hard links.
    """
    target = Path(target)
    content = content.encode() if isinstance(content, str) else content
    with naming(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
        scratch = Path(name)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            _open_to_readers(scratch, 0o666)
            return place(scratch, target)
        finally:
            with contextlib.suppress(OSError):
                scratch.unlink(missing_ok=True)


def place(source: Path, target: Path) -> bool:
    """Move a whole file on the same disk to target unless that is there, and tell whether it is ours.

    Raises: NotWritten.
    """
    with naming(target):
        try:
            os.link(source, target)
        except FileExistsError:
            # NFS may repeat a request whose answer was lost: then the file that was in the way is our own.
            ours = target.exists() and os.path.samefile(source, target)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            raise NotWritten(
                f"{target} must be on a disk with hard links, by which one of several writers wins, got "
                f"{error.strerror}: name a directory on another disk"
            ) from error
        else:
            ours = True
            _sync(target.parent)
        source.unlink()
        return ours


def place_directory(source: Path, target: Path) -> bool:
    """Rename a directory to target unless that is there, and tell whether it is ours; else source is deleted.

    Raises: NotWritten.
    """
    with naming(target):
        try:
            source.rename(target)  # onto a directory with anything in it this fails
        except OSError:
            if not target.is_dir():
                raise
            shutil.rmtree(source)
            return False
        _sync(target.parent)
        return True


def remove(path: Path) -> None:
    """Delete a file or a directory, of which no part is ever seen under its name. Raises: NotWritten."""
    with naming(path, "deleted"):
        if path.is_dir() and not path.is_symlink():
            scratch = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
            path.rename(scratch)
            shutil.rmtree(scratch)
        else:
            path.unlink()


def target_of(name: str) -> str | None:
    """Of what a file or directory called name is the scratch; None if it is none."""
    found = _SCRATCH.fullmatch(name)
    return found and found.group(1)


def sweep(directory: Path, ours: Callable[[str], object]) -> None:
    """Delete what killed writers left of targets in directory whose names are ours; nobody may be writing there.

    A target that was about to be replaced, and is missing, comes back. Raises: NotWritten.
    """
    for entry in list(directory.iterdir()):
        name = target_of(entry.name)
        if name is None or not ours(name):
            continue
        target = entry.with_name(name)
        with naming(entry, "deleted"):
            if entry.suffix == ".old" and not target.exists():
                entry.rename(target)
            elif entry.is_dir():
                shutil.rmtree(entry)
            else:
                entry.unlink()


def _move_into_place(scratch: Path, target: Path, replace: bool) -> None:
    if not target.exists():
        try:
            scratch.rename(target)
            return
        except OSError:
            if not target.is_dir():  # not a race with another writer: a real failure
                raise
    if not replace:
        return
    old = scratch.with_suffix(".old")
    target.rename(old)
    try:
        scratch.rename(target)
    except OSError:
        old.rename(target)  # what was there before is worth more than a clean-up
        raise
    shutil.rmtree(old)


def _open_to_readers(scratch: Path, mode: int) -> None:
    """tempfile and safetensors give the owner alone access; the target gets what the umask allows."""
    umask = os.umask(0)
    os.umask(umask)
    scratch.chmod(mode & ~umask)


def _sync_tree(directory: Path) -> None:
    for path in directory.rglob("*"):
        _sync(path)
    _sync(directory)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
