"""Compile the programs in programs/ if something has changed, and run them."""

import fcntl
import subprocess
from collections.abc import Sequence
from pathlib import Path

import emulated

from building.compile import Unit, build


def built(name: str) -> Path:
    """Return the object file of an emulated source."""
    return Path(emulated.library()._name).parent / f"{name}.o"


def run(source: str, objects: Sequence[Path] = (), flags: Sequence[str] = ()) -> str:
    """Compile a source of programs/ with ``flags``, link and run it; return its output, which describes any failure."""
    directory = emulated.ROOT / "build" / "host_programs" / Path(source).stem
    directory.mkdir(parents=True, exist_ok=True)
    compiler = emulated.compiler()
    unit = Unit(emulated.PROGRAMS / source, compiler, [*emulated.FLAGS, *flags])
    program = directory / "program"
    with open(directory / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two test runs build one after the other
        build(directory, [unit])
        linked = [str(directory / unit.object), *map(str, objects)]
        subprocess.run([compiler, *linked, "-o", str(program)], check=True)
        result = subprocess.run([str(program)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout
