"""Packages mft_kernels and mft, and two compiled libraries: mft_kernels/libmft_cpu.so and mft_kernels/libmft_cuda.so.

The folder building/ makes the libraries, each without the other. Where one cannot be built (no torch, no compiler, no
nvcc, a compiler that fails) the install goes on, and mft_kernels/_build.json keeps the reason for backend_report().
MFT_BUILD=0 skips both; MFT_BUILD=1 makes a failed build of the cpu's library an error. MFT_CUDA, see building/cuda.py,
is the other's switch.
"""

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))  # pip runs this file without its folder there

from building import cpu, cuda  # noqa: E402
from building.compile import CannotBuild  # noqa: E402

REPORT = "_build.json"
FASTER = "faster.json"  # of mft_kernels/faster.py; a measurement that is not there leaves "auto" as it is
MEASURED = ROOT / "benchmarks" / "results" / "gpu-faster.json"


def build_cpu(temporary: Path) -> tuple[Path, dict]:
    used = cpu.build_cpu(temporary, ROOT / "csrc")
    return temporary / cpu.LIBRARY, used


def build_cuda(_: Path) -> tuple[Path, dict]:
    if (asked := cuda.wanted()) is None:
        raise CannotBuild("the build was skipped: MFT_CUDA=0")
    # Not in pip's temporary folder: a second build compiles what changed, and the logs tell of registers and spills.
    directory = ROOT / "build" / "cuda"
    used = cuda.build_cuda(directory, ROOT / "csrc" / "cuda", asked)
    return directory / cuda.LIBRARY, used


class BuildLibraries(build_ext):
    """Builds the libraries beside the package's Python files."""

    def run(self) -> None:
        target = ROOT / "mft_kernels" if self.inplace else Path(self.build_lib, "mft_kernels")
        target.mkdir(parents=True, exist_ok=True)
        temporary = Path(self.build_temp, "csrc").resolve()
        asked = cuda.wanted()  # a wrong MFT_CUDA is an error before minutes are spent
        report = {
            "cpu": attempt(build_cpu, temporary, target / cpu.LIBRARY, os.environ.get("MFT_BUILD") == "1"),
            "cuda": attempt(build_cuda, temporary, target / cuda.LIBRARY, asked is not None and asked.required),
        }
        (target / REPORT).write_text(json.dumps(report, indent=2) + "\n")
        (target / FASTER).unlink(missing_ok=True)
        if MEASURED.exists():
            shutil.copy(MEASURED, target / FASTER)

    def get_outputs(self) -> list[str]:
        built = [Path(self.build_lib, "mft_kernels", name) for name in (cpu.LIBRARY, cuda.LIBRARY, REPORT, FASTER)]
        return [str(path) for path in built if path.exists()]

    def get_output_mapping(self) -> dict[str, str]:
        return {}  # in an editable install the libraries already lie beside the package's files


def attempt(build: Callable[[Path], tuple[Path, dict]], temporary: Path, target: Path, required: bool) -> dict:
    """Build one library and put it at ``target``. Returns its part of the report; raises only where it is required."""
    try:
        if os.environ.get("MFT_BUILD") == "0":
            raise CannotBuild("the build was skipped: MFT_BUILD=0")
        library, used = build(temporary)
    except CannotBuild as reason:
        target.unlink(missing_ok=True)
        if required:
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


setup(
    packages=[*find_packages(include=["mft_kernels", "mft_kernels.*"]), *find_packages("python")],
    package_dir={"mft_kernels": "mft_kernels", "mft": "python/mft"},
    package_data={
        "mft": ["configs/*.yaml", "configs/compare/*.yaml", "py.typed"],
        "mft.memory": ["known_models/*.json"],
        "mft.models": ["templates/*.jinja"],
        "mft_kernels": ["py.typed", "cubins/*.zip"],  # PEP 561: type checkers read our annotations
    },
    ext_modules=[Extension("mft_kernels.libmft_cpu", sources=[])],
    cmdclass={"build_ext": BuildLibraries},
)
