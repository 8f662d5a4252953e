"""Directories and files that appear whole or not at all: written beside the target, synced, then renamed."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_directory(target: str | os.PathLike, *, replace: bool = True) -> Iterator[Path]:
    """Yield an empty directory that becomes target when the block ends well, and vanishes when it does not.

    With replace=False a target that another process finished first stays, and ours is dropped: both hold the same.
    """
    target = Path(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
    except OSError as error:
        raise OSError(
            f"{target} must lie where directories can be made, got {target.parent} ({error.strerror}): name another one"
        ) from error
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
    """Yield a path; what is written there becomes target when the block ends well, and vanishes when it does not."""
    target = Path(target)
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
        scratch.unlink(missing_ok=True)


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
