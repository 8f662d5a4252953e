"""Compile the programs in programs/ if something has changed, and run them."""

import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import emulated
import pytest

from building.compile import CannotBuild, Unit, system_headers
from building.nvcc import find_nvcc


def cuda_headers() -> list[str]:
    """Return flags for CUDA's headers; skip if they are missing."""
    try:
        return system_headers(find_nvcc().include)
    except CannotBuild as reason:
        pytest.skip(f"CUDA's headers are needed: {reason}")


def built(name: str) -> Path:
    """Return the object file of an emulated source."""
    return Path(emulated.library()._name).parent / f"{name}.o"


def run(source: str, objects: Sequence[Path] = (), flags: Sequence[str] = ()) -> str:
    """Compile a source of programs/ with ``flags``, link and run it; return its output, which describes any failure."""
    directory = emulated.ROOT / "build" / "host_programs" / Path(source).stem
    unit = Unit(emulated.PROGRAMS / source, emulated.compiler(), [*emulated.FLAGS, *flags])
    emulated.build(directory, [unit])
    with tempfile.TemporaryDirectory() as folder:
        program = str(Path(folder, "program"))
        linked = [str(directory / unit.object), *map(str, objects)]
        subprocess.run([unit.compiler, *linked, "-o", program], check=True)
        result = subprocess.run([program], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout
