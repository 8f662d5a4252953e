"""Training checkpoints on disk: complete or absent, and verified before older ones are deleted.

    checkpoints/step-00000120/state.safetensors   tensors
                              state.json          everything else
                              shard-*             rows of tensors that are spread over processes (spread_rows.py)
                              manifest.json       sizes and SHA-256 of the other files; written last

A checkpoint is written under another name, synced, renamed, and read again. Only then are the older ones deleted. A
process that is killed at any point leaves a directory that verifies. No pickle is written or read.
"""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from mft.engines.distributed import ALONE, Processes
from mft.files.atomic import atomic_directory, convert_disk_errors, remove, sweep
from mft.files.cache import sha256_of
from mft.files.json_file import read_object
from mft.files.safetensors_file import open_tensors
from mft.training.spread_rows import ROWS, write_rows
from mft_kernels.internal import is_spread, rows_here

FORMAT_VERSION = 1
TENSORS, FACTS, MANIFEST = "state.safetensors", "state.json", "manifest.json"
_NAME = re.compile(r"step-(\d{8,})")
_MOST_MANIFEST = 1 << 16  # bytes
_MOST_FACTS = 1 << 30  # bytes: the reports of millions of steps
_REMEDY = "restore what was written, or delete the checkpoint"
_HEADROOM = 1 << 20  # bytes that a checkpoint may need in addition to its tensors


class BadCheckpoint(ValueError):
    """A checkpoint that does not verify. The message names the file, the expected value and the found one."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that has been verified."""

    path: Path
    step: int

    def tensors(self) -> dict[str, Tensor]:
        """Read the tensors to the CPU. Raises: BadCheckpoint."""
        path = self.path / TENSORS
        with _converting_errors(path), open_tensors(path, _REMEDY) as file:
            return {name: file.get_tensor(name) for name in list(file.keys())}

    def facts(self) -> dict[str, Any]:
        """Read everything that is not a tensor. Raises: BadCheckpoint."""
        return _read_json(self.path / FACTS, _MOST_FACTS)

    def run(self) -> dict[str, Any]:
        """Return what a command-line run needs to resume: config and metrics. Raises: BadCheckpoint."""
        run = self.facts().get("run")
        if not isinstance(run, dict) or run.keys() != {"config", "events"}:
            raise BadCheckpoint(
                f"{self.path / FACTS}: expected the config and events of a run of this version of mft, got "
                f"{sorted(run) if isinstance(run, dict) else run}: go on with the version or the program that wrote it"
            )
        return run


def write_checkpoint(
    root: Path,
    step: int,
    tensors: Mapping[str, Tensor],
    facts: Mapping[str, Any],
    *,
    keep: int | None = None,
    processes: Processes = ALONE,
) -> Checkpoint:
    """Save the newest checkpoint under root, verify it, then delete the others except for the one of step ``keep``.

    Args: facts: values that JSON can hold; processes: those over which DTensors are spread, each of which must call
        this.
    Raises: OSError if the disk is full or cannot be written (NotWritten), and older checkpoints then stay;
        BadCheckpoint if the written files do not verify.
    """
    spread = {name: tensor for name, tensor in tensors.items() if is_spread(tensor)}
    (needed,) = processes.sum(sum(rows_here(tensor).nbytes for tensor in spread.values()))
    target = _checkpoint_path(root, step)
    with contextlib.ExitStack() as whole_or_absent:
        scratch = None
        with processes.together():
            if processes.first:
                prepare(root)
                plain = {name: tensor for name, tensor in tensors.items() if name not in spread}
                check_space(root, int(needed) + sum(tensor.nbytes for tensor in plain.values()))
                scratch = whole_or_absent.enter_context(atomic_directory(target))
        everywhere = processes.gather(scratch)[0]
        if spread:
            write_rows(spread, everywhere)
        with processes.together():
            if scratch is not None:
                _write_files(scratch, step, plain, facts)
    with processes.together():
        if processes.first:
            verify_checkpoint(target)
            for other in _checkpoint_paths(root):
                if other not in (target, None if keep is None else _checkpoint_path(root, keep)):
                    remove(other)
    return Checkpoint(target, step)


def _write_files(folder: Path, step: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write all files but the rows of the processes; the manifest covers all files."""
    save_file({name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}, folder / TENSORS)
    (folder / FACTS).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    paths = sorted(folder.iterdir())
    files = {path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)} for path in paths}
    manifest = {"format_version": FORMAT_VERSION, "step": step, "files": files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def prepare(root: Path) -> None:
    """Make root if needed, and delete the incomplete files of killed writers. Raises: NotWritten."""
    with convert_disk_errors(root):
        root.mkdir(parents=True, exist_ok=True)
    sweep(root, _NAME.fullmatch)


def check_space(root: Path, needed: int) -> None:
    """Raise OSError if the disk of root has less free space than needed bytes plus some headroom."""
    needed += _HEADROOM
    free = shutil.disk_usage(root).free
    if free < needed:
        raise OSError(
            f"{root}: checkpoints take {needed / 1e9:.2f} GB more, because a new one is written before the old one "
            f"is deleted; {free / 1e9:.2f} GB are free: make room, or name another output_dir"
        )


def newest_checkpoint(root: Path) -> tuple[Checkpoint | None, list[str]]:
    """Return the newest checkpoint that verifies, and why each newer one was skipped."""
    skipped: list[str] = []
    for path in reversed(_checkpoint_paths(root)):
        try:
            return verify_checkpoint(path), skipped
        except BadCheckpoint as error:
            skipped.append(str(error))
    return None, skipped


def checkpoint_at(root: Path, step: int) -> Checkpoint:
    """Return the checkpoint of this step. Raises: BadCheckpoint, also if there is none."""
    return verify_checkpoint(_checkpoint_path(root, step))


def verify_checkpoint(path: Path) -> Checkpoint:
    """Check the manifest strictly, then the sizes, then the hashes. Raises: BadCheckpoint."""
    with _converting_errors(path):
        return _verify(path)


def _verify(path: Path) -> Checkpoint:
    named = _NAME.fullmatch(path.name)
    manifest_path = path / MANIFEST
    manifest = _read_json(manifest_path, _MOST_MANIFEST)
    _expect_keys(manifest_path, "keys", manifest, ["files", "format_version", "step"])
    version = manifest["format_version"]
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise BadCheckpoint(f"{manifest_path}: expected format_version {FORMAT_VERSION}, got {version}: upgrade mft")
    _expect(manifest_path, "format_version", version, FORMAT_VERSION)
    _expect(manifest_path, "step", manifest["step"], int(named.group(1)) if named else None)
    files = manifest["files"]
    rows = [name for name in files if ROWS.fullmatch(name)] if isinstance(files, dict) else []
    _expect_keys(manifest_path, "files", files, [FACTS, TENSORS, *rows])
    for name, described in files.items():
        _expect_keys(manifest_path, f"files.{name}", described, ["bytes", "sha256"])
    _expect(path, "files", sorted(os.listdir(path)), sorted([FACTS, MANIFEST, TENSORS, *rows]))
    for name, described in files.items():
        with _converting_errors(path / name):
            _expect(path / name, "bytes", (path / name).stat().st_size, described["bytes"])
    for name, described in files.items():
        with _converting_errors(path / name):
            _expect(path / name, "sha256", sha256_of(path / name), described["sha256"])
    return Checkpoint(path, manifest["step"])


def _checkpoint_path(root: Path, step: int) -> Path:
    return root / f"step-{step:08d}"


def _checkpoint_paths(root: Path) -> list[Path]:
    """Return the checkpoints' paths, the oldest first."""
    entries = root.iterdir() if root.is_dir() else []
    numbered = [(int(named.group(1)), entry) for entry in entries if (named := _NAME.fullmatch(entry.name))]
    return [entry for _, entry in sorted(numbered)]


def _read_json(path: Path, most: int) -> dict[str, Any]:
    with _converting_errors(path):
        return read_object(path, most)


@contextmanager
def _converting_errors(path: Path) -> Iterator[None]:
    """Turn the errors of a file's readers into BadCheckpoint."""
    try:
        yield
    except OSError as error:
        raise _unreadable(path, error.strerror or str(error)) from None  # safetensors gives no strerror
    except RuntimeError as error:  # from torch, which maps the file
        raise _unreadable(path, str(error)) from None
    except ValueError as error:
        raise BadCheckpoint(str(error)) from None


def _expect_keys(path: Path, what: str, got: Any, expected: list[str]) -> None:
    if not isinstance(got, dict):
        raise BadCheckpoint(f"{path}: expected {what} {sorted(expected)}, got {got!r}: {_REMEDY}")
    _expect(path, what, sorted(got), sorted(expected))


def _unreadable(path: str | os.PathLike, reason: str | None) -> BadCheckpoint:
    return BadCheckpoint(
        f"{path}: expected a file that can be read, got {reason}: check the disk, or restore what was written"
    )


def _expect(path: Path, what: str, got: Any, expected: Any) -> None:
    if got != expected or type(got) is not type(expected):
        raise BadCheckpoint(f"{path}: expected {what} {expected}, got {got}: {_REMEDY}")
