"""python -m benchmarks.gpu.bundle [FOLDER]: pack what `make gpu` needs on a machine without a network into one folder.

The folder holds sources and tests, and the libraries from mft_kernels with _build.json. On that machine: cd FOLDER &&
make gpu OUT=results. BUNDLE.json names the commit and what the CUDA library lacks.

Exit code: 0 complete; 2 nothing was written; 3 written, but the CUDA library lacks something.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mft_kernels.backends.built import report

from ..records import RESULTS, ROOT

MANIFEST = "BUNDLE.json"
#: Size of the whole folder: a session may carry 64 MiB to a lent machine.
MOST_BYTES = 64_000_000
_FOLDERS = ("mft_kernels", "python", "benchmarks", "building", "csrc", "tests")
_FILES = ("Makefile", "setup.py", "pyproject.toml", "MANIFEST.in", "README.md")
_LEFT_OUT = frozenset({"__pycache__", RESULTS.name, ".pytest_cache"})


def write(folder: Path) -> list[str]:
    """Create the folder again and return in words what the CUDA library lacks.

    Raises: ValueError, before anything is written, if the bundle is too large, or the folder exists and is none.
    """
    files = dict(_files())
    size = sum(path.stat().st_size for path in files.values())
    if size > MOST_BYTES:
        raise ValueError(f"the bundle must be at most {MOST_BYTES / 1e6:g} MB, got {size / 1e6:.1f} MB")
    lacks = lacking(report("cuda"))
    if folder.exists():
        if not (folder / MANIFEST).exists():
            raise ValueError(f"the folder must be new or an earlier bundle, got {folder} without {MANIFEST}")
        shutil.rmtree(folder)
    for name, path in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, folder / name)
    about = {"commit": _git("rev-parse", "HEAD"), "tree_is_dirty": bool(_git("status", "--porcelain")), "lacks": lacks}
    (folder / MANIFEST).write_text(json.dumps(about, indent=1) + "\n")
    return lacks


def lacking(built: Mapping[str, Any]) -> list[str]:
    """Return what the CUDA library lacks, from its part of _build.json."""
    if not built.get("built"):
        return [f"libmft_cuda.so: {built.get('reason') or 'setup.py has not run'}; make cuda builds it"]
    return [f"{group}: {why}; the general kernels run in its place" for group, why in built["left_out"].items()]


def commit_of(root: Path = ROOT) -> dict[str, Any]:
    """Return commit and tree_is_dirty of the bundle at ``root``; empty in a checkout, where git knows them."""
    path = root / MANIFEST
    known = json.loads(path.read_text()) if path.exists() else {}
    return {key: known[key] for key in ("commit", "tree_is_dirty") if key in known}


def main(arguments: list[str]) -> int:
    """Make the bundle, print what it holds, and return the exit code."""
    folder = Path(arguments[0]) if arguments else ROOT / "build" / "gpu-bundle"
    try:
        lacks = write(folder)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{folder}: {size / 1e6:.1f} of {MOST_BYTES / 1e6:g} MB; there: make gpu OUT=results")
    for what in lacks:
        print(f"WITHOUT {what}")
    return 3 if lacks else 0


def _files() -> Iterator[tuple[Path, Path]]:
    # A library that the last build did not make comes from an earlier build of other sources.
    stale = set() if report("cuda").get("built") else {"libmft_cuda.so"}
    for path in [ROOT / name for name in _FILES] + [p for name in _FOLDERS for p in sorted((ROOT / name).rglob("*"))]:
        name = path.relative_to(ROOT)
        left_out = (_LEFT_OUT | stale) & {*name.parts} or any(part.endswith(".egg-info") for part in name.parts)
        if path.is_file() and not left_out:
            yield name, path


def _git(*arguments: str) -> str:
    run = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    return run.stdout.strip() if run.returncode == 0 else ""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
