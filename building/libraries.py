"""setuptools' commands that build the libraries next to the package's Python files, and name the wheel.

MFT_BUILD=0 is the only way to a package without kernels, in plain PyTorch; otherwise a CPU library that cannot be built
is an error. The CUDA library is built if there are a GPU and an nvcc; MFT_CUDA (building/cuda.py) is its switch.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

from . import cpu, cuda
from .compile import CannotBuild, find_compiler, find_torch
from .gpu import gpu_is_present
from .sources import digest

ROOT = Path(__file__).resolve().parent.parent
REPORT = "_build.json"
FASTER = "faster.json"  # of mft_kernels/backends/faster.py; without a measurement "auto" stays as it is
MEASURED = ROOT / "benchmarks" / "results" / "gpu-faster.json"
BUILDING = {"bdist_wheel", "editable_wheel", "build", "build_ext", "install", "develop"}  # among setup.py's commands


def wanted() -> bool:
    """Whether kernels are wanted: MFT_BUILD. Raises: ValueError for an unknown value."""
    value = os.environ.get("MFT_BUILD", "1")
    if value not in ("0", "1"):
        raise ValueError(f"MFT_BUILD must be 0 (no kernels) or 1, got {value!r}")
    return value == "1"


def refusal(arguments: list[str]) -> str | None:
    """Return why setup.py with these arguments cannot build, and what to do, in one line; None if no reason is known.

    pip shows the first line of the output, and its default, an isolated build, hides torch.
    """
    if not BUILDING & {*arguments} or not wanted():
        return None
    try:
        find_torch()
        find_compiler()
    except CannotBuild as reason:
        return f"mft_kernels: its kernels cannot be built: {reason}. Without kernels, in plain PyTorch: MFT_BUILD=0"
    return None


class BuildLibraries(build_ext):
    """Builds the libraries next to the package's Python files."""

    def run(self) -> None:
        target = ROOT / "mft_kernels" if self.inplace else Path(self.build_lib, "mft_kernels")
        target.mkdir(parents=True, exist_ok=True)
        asked = cuda.wanted()  # a wrong MFT_CUDA must fail before minutes are spent
        report = {
            "cpu": attempt(build_cpu, target / cpu.LIBRARY, required=True),
            "cuda": attempt(build_cuda, target / cuda.LIBRARY, required=asked is not None and asked.required),
        }
        report["cpu"]["sources"] = digest()
        (target / REPORT).write_text(json.dumps(report, indent=2) + "\n")
        (target / FASTER).unlink(missing_ok=True)
        if MEASURED.exists():
            shutil.copy(MEASURED, target / FASTER)

    def get_outputs(self) -> list[str]:
        built = [Path(self.build_lib, "mft_kernels", name) for name in (cpu.LIBRARY, cuda.LIBRARY, REPORT, FASTER)]
        return [str(path) for path in built if path.exists()]

    def get_output_mapping(self) -> dict[str, str]:
        return {}  # in an editable install the libraries are already next to the package's files


class StableWheel(bdist_wheel):
    """One wheel for every Python and torch: the libraries use no symbol of Python, and torch only by its stable ABI."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.root_is_pure = not wanted()

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2] if wanted() else "any"


# Not in pip's temporary folder: a second build, even by another command, then compiles only what changed, and the logs
# of registers and spills are kept.
def build_cpu() -> tuple[Path, dict]:
    directory = ROOT / "build" / "cpu"
    used = cpu.build_cpu(directory, ROOT / "csrc")
    return directory / cpu.LIBRARY, used


def build_cuda() -> tuple[Path, dict]:
    if (asked := cuda.wanted()) is None:
        raise CannotBuild("the build was skipped: MFT_CUDA=0")
    if not asked.required and not gpu_is_present():
        raise CannotBuild("no NVIDIA GPU was found; make cuda builds it anyway")
    directory = ROOT / "build" / "cuda"
    used = cuda.build_cuda(directory, ROOT / "csrc" / "cuda", asked)
    return directory / cuda.LIBRARY, used


def attempt(build: Callable[[], tuple[Path, dict]], target: Path, *, required: bool) -> dict:
    """Build one library and put it at ``target``. Returns its part of the report; raises if a required one fails."""
    try:
        if not wanted():
            raise CannotBuild("the build was skipped: MFT_BUILD=0")
        library, used = build()
    except CannotBuild as reason:
        target.unlink(missing_ok=True)
        if required and wanted():
            raise
        print(f"mft_kernels: without {target.name}: {reason}")
        return {"built": False, "reason": str(reason)}
    # A new file, not new contents: a process may have the old one mapped.
    target.unlink(missing_ok=True)
    shutil.copy(library, target)
    print(f"mft_kernels: built {target}")
    for name, reason in used.get("left_out", {}).items():
        print(f"mft_kernels: without {name}: {reason}")
    return {"built": True, "reason": None, **used}
