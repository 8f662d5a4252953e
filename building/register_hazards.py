"""Decide if code that feeds warpgroup MMAs from registers may ship: with a new assembler, or after a clean scan.

ptxas older than 13.3 can overwrite such a register while an MMA still reads it (see machine_code/hazard.py). Such
code is wrong only now and then, so it is scanned instead of trusted.
"""

import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from .compile import CannotBuild
from .nvcc import Version, shown

SAFE_PTXAS: Version = (13, 3)
REMEDY = "pip install 'nvidia-cuda-nvcc>=13.3'"


@dataclass(frozen=True)
class Readers:
    """The programs that a scan needs."""

    cuobjdump: str
    nvdisasm: str


def find_readers() -> Readers | None:
    """Find them in PATH or in Triton; None if a scan is impossible. A scan needs an installed Triton."""
    triton = find_spec("triton")
    if triton is None:
        return None
    bundled = [str(Path(place, "backends/nvidia/bin")) for place in triton.submodule_search_locations or []]
    found = [
        next((path for where in (None, *bundled) if (path := shutil.which(name, path=where))), None)
        for name in ("cuobjdump", "nvdisasm")
    ]
    return Readers(*found) if all(found) else None  # type: ignore[arg-type]


def refusal_before(ptxas: Version, readers: Readers | None) -> str | None:
    """Return why such code need not even be compiled; None if it may turn out well."""
    if ptxas >= SAFE_PTXAS or readers is not None:
        return None
    return (
        f"ptxas {shown(ptxas)} can overwrite registers that a warpgroup MMA reads, and without nvdisasm and Triton "
        f"its code cannot be checked; {REMEDY}"
    )


def refusal_after(ptxas: Version, readers: Readers | None, objects: Sequence[Path]) -> str | None:
    """Return why the compiled objects must not be linked; None if they may."""
    if ptxas >= SAFE_PTXAS:
        return None
    assert readers is not None, "refusal_before lets no old assembler pass without readers"
    from .machine_code.hazard import hazards  # needs Triton

    register_fed = 0
    for path in objects:
        for name, code in disassemble(readers, path).items():
            register_fed += len(re.findall(r"HGMMA\.\S+ R\d+, R\d+,", code))
            try:
                found = hazards(code)
            except ValueError as error:
                return f"the code of ptxas {shown(ptxas)} could not be checked ({name}: {error}); {REMEDY}"
            if found:
                return f"ptxas {shown(ptxas)} overwrites registers in flight ({name}: {found[0]}); {REMEDY}"
    if not register_fed:
        return f"the check of ptxas {shown(ptxas)} found no warpgroup MMA from registers in its code; {REMEDY}"
    return None


def disassemble(readers: Readers, path: Path) -> dict[str, str]:
    """Return {kernel: nvdisasm's text} of an object made by nvcc."""
    texts: dict[str, str] = {}
    for cubin in cubins(readers, path):
        texts |= disassembled(readers, cubin)
    return texts


def cubins(readers: Readers, path: Path) -> Iterator[Path]:
    """Yield the machine code for each target in an object; a file lives until the next."""
    with tempfile.TemporaryDirectory() as directory:
        output([readers.cuobjdump, "--extract-elf", "all", str(path.resolve())], directory)
        yield from sorted(Path(directory).glob("*.cubin"))


def disassembled(readers: Readers, cubin: Path) -> dict[str, str]:
    """Return {kernel: nvdisasm's text}: each kernel is in a section .text.NAME."""
    text = output([readers.nvdisasm, "-c", str(cubin)])
    pieces = re.split(r"^\s*\.section\s+\.text\.([^\s,]+).*$", text, flags=re.MULTILINE)
    return dict(zip(pieces[1::2], pieces[2::2], strict=True))


def output(command: list[str], directory: str | None = None) -> str:
    """Return the standard output of a reader. Raises: CannotBuild with the first line of its error."""
    result = subprocess.run(command, capture_output=True, text=True, cwd=directory)
    if result.returncode != 0:
        lines = (result.stderr + result.stdout).splitlines()
        raise CannotBuild(f"{Path(command[0]).name} failed: {(lines or ['no output'])[0]}")
    return result.stdout
