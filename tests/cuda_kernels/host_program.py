"""The programs beside this file: compiled where something changed, and run."""

import fcntl
import subprocess
from collections.abc import Sequence
from pathlib import Path

import emulated

from building.compile import Unit, build


def built(name: str) -> Path:
    """The object of an emulated file."""
    return Path(emulated.library()._name).parent / f"{name}.o"


def run(source: str, objects: Sequence[Path] = (), flags: Sequence[str] = ()) -> str:
    """What the program of one of programs/ prints; it says what went wrong. Compiled with ``flags``, and linked."""
    directory = emulated.ROOT / "build" / "host_programs" / Path(source).stem
    directory.mkdir(parents=True, exist_ok=True)
    compiler = emulated.compiler()
    unit = Unit(emulated.PROGRAMS / source, compiler, [*emulated.FLAGS, *flags])
    program = directory / "program"
    with open(directory / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two runs of the tests build one after the other
        build(directory, [unit])
        linked = [str(directory / unit.object), *map(str, objects)]
        subprocess.run([compiler, *linked, "-o", str(program)], check=True)
        result = subprocess.run([str(program)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout
