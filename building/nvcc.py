"""Find the nvcc that compiles the CUDA kernels, and CUTLASS's headers.

An nvcc may come with the system ($CUDA_HOME/bin, PATH) or from PyPI (nvidia-cuda-nvcc). The one with the newest
assembler is used, because some code needs a new one. MFT_NVCC=/path/to/nvcc names one that must be used.
"""

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from .compile import CannotBuild

Version = tuple[int, int]

#: 12.0 knows sm_90a, and CUTLASS needs 12.3 for it; 13.0 and 13.5 were tested.
OLDEST: Version = (12, 3)
INSTALL = "pip install nvidia-cuda-nvcc nvidia-cuda-cccl, or CUDA's toolkit"


@dataclass(frozen=True)
class Nvcc:
    """A compiler. ``root``: its toolkit, also if ``path`` is a script that calls it."""

    path: Path
    root: Path
    version: Version
    ptxas: Version

    @property
    def include(self) -> list[Path]:
        """The folders of its headers."""
        return [folder for folder in (self.root / "include", self.root / "include" / "cccl") if folder.is_dir()]

    @property
    def runtime(self) -> Path:
        """The static runtime library: what is linked with it loads without any part of CUDA."""
        for folder in ("lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib"):
            if (library := self.root / folder / "libcudart_static.a").exists():
                return library
        raise CannotBuild(f"{self.path} has no libcudart_static.a below {self.root}; pip install nvidia-cuda-runtime")

    def __str__(self) -> str:
        return f"nvcc {shown(self.version)} ({self.path})"


def find_nvcc() -> Nvcc:
    """Return the nvcc to use. Raises: CannotBuild if there is none, or none new enough."""
    named = os.environ.get("MFT_NVCC")
    found, broken = [], []
    for path in [Path(named)] if named else _candidates():
        try:
            found.append(read(path))
        except CannotBuild as reason:
            broken.append(str(reason))
    if not found:
        raise CannotBuild("; ".join(broken) or f"no nvcc found ($CUDA_HOME, PATH, PyPI's); {INSTALL}")
    best = max(found, key=lambda nvcc: nvcc.ptxas)  # the first of equals
    if best.version < OLDEST:
        raise CannotBuild(f"nvcc must be {shown(OLDEST)} or newer, got {best}; {INSTALL}")
    return best


def read(path: Path) -> Nvcc:
    """Return version and toolkit of the compiler at ``path``. Raises: CannotBuild if it does not run."""
    with tempfile.TemporaryDirectory() as directory:
        source = Path(directory, "empty.cu")
        source.touch()
        plan = _output(path, "--dryrun", "-c", str(source), "-o", f"{source}.o")
    here = re.search(r"_HERE_=(\S.*)", plan)
    root = Path(here[1]).parent if here else path.resolve().parent.parent
    return Nvcc(
        path, root, _release(_output(path, "--version")), _release(_output(root / "bin" / "ptxas", "--version"))
    )


def find_cutlass() -> tuple[str, Path] | None:
    """Return CUTLASS's (version, include directory): $CUTLASS_PATH/include, or the headers of PyPI's nvidia-cutlass."""
    folders = []
    if named := os.environ.get("CUTLASS_PATH"):
        folders.append(Path(named, "include"))
    elif package := find_spec("cutlass_library"):
        folders += [Path(place, "source", "include") for place in package.submodule_search_locations or []]
    for folder in folders:
        if (folder / "cute" / "tensor.hpp").exists():
            text = (folder / "cutlass" / "version.h").read_text()
            return ".".join(re.findall(r"#define CUTLASS_(?:MAJOR|MINOR|PATCH) (\d+)", text)), folder
    return None


def shown(version: Version) -> str:
    return ".".join(map(str, version))


def _candidates() -> Iterator[Path]:
    if home := os.environ.get("CUDA_HOME"):
        yield Path(home, "bin", "nvcc")
    if path := shutil.which("nvcc"):
        yield Path(path)
    package = find_spec("nvidia")
    for place in (package.submodule_search_locations if package else None) or []:
        yield from sorted(Path(place).glob("cu*/bin/nvcc"), reverse=True)


def _release(text: str) -> Version:
    found = re.search(r"release (\d+)\.(\d+)", text)
    if found is None:
        raise CannotBuild(f"--version of nvcc and ptxas must name a release, got {text!r}")
    return int(found[1]), int(found[2])


def _output(program: Path, *arguments: str) -> str:
    try:
        result = subprocess.run([program, *arguments], capture_output=True, text=True)
    except OSError as error:
        raise CannotBuild(f"{program} does not run: {error.strerror}; {INSTALL}") from error
    text = result.stdout + result.stderr
    if result.returncode != 0:
        raise CannotBuild(f"{program} {arguments[0]} failed: {(text.splitlines() or ['no output'])[0]}")
    return text
