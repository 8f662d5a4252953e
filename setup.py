"""Packages mft_kernels and mft, and the C++ library of the cpu backend, mft_kernels/libmft_cpu.so.

The library is built with ninja where that is at hand. Where it cannot be built (no torch, no compiler, a compiler that
fails) the install goes on in pure Python, and mft_kernels/_build.json keeps the reason for backend_report().
MFT_BUILD=0 skips the build; MFT_BUILD=1 makes a failed build an error.
"""

import json
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
LIBRARY = "libmft_cpu.so"
REPORT = "_build.json"

COMMON_FLAGS = ["-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-Wall", "-Wextra"]
TORCH_TARGET = "0x020b000000000000"  # the stable ABI of torch 2.11
X86_FLAGS = {
    "row_kernels_avx2.cpp": ["-mavx2", "-mfma"],
    "row_kernels_avx512.cpp": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"],
    "gemm_bfloat16.cpp": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512bf16", "-mfma"],
}
DOT_BFLOAT16_ONLY = ("gemm_bfloat16.cpp", "fused_linear.cpp")


class CannotBuild(Exception):
    """Why there is no library on this machine."""


def find_compiler() -> str:
    """The C++ compiler: $CXX, or g++, clang++ or c++."""
    wanted = os.environ.get("CXX")
    for name in [wanted] if wanted else ["g++", "clang++", "c++"]:
        if path := shutil.which(name):
            return path
    raise CannotBuild(f"no C++ compiler found ({wanted or 'g++, clang++, c++'}); install one, for instance g++")


def find_torch() -> tuple[str, Path]:
    """(version, directory) of the torch that runs this build."""
    try:
        import torch
    except ImportError as error:
        raise CannotBuild(
            f"torch is not importable while building ({error}); install torch, then pip install --no-build-isolation"
        ) from error
    return torch.__version__, Path(torch.__file__).parent


def accepts(compiler: str, flags: list[str]) -> bool:
    """Whether the compiler knows ``flags``."""
    with tempfile.TemporaryDirectory() as directory:
        source = Path(directory, "empty.cpp")
        source.write_text("int main() {}\n")
        command = [compiler, *flags, "-c", str(source), "-o", str(Path(directory, "empty.o"))]
        return subprocess.run(command, capture_output=True).returncode == 0


def compile_commands(compiler: str, torch_directory: Path) -> list[tuple[Path, list[str]]]:
    """(source, flags) for each file of the library that this machine and compiler can use."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    dot_bfloat16 = x86 and accepts(compiler, ["-mavx512bf16"])
    flags = [
        *COMMON_FLAGS,
        f"-DTORCH_TARGET_VERSION={TORCH_TARGET}",
        *(["-DMFT_X86"] if x86 else []),
        *(["-DMFT_DOT_BFLOAT16"] if dot_bfloat16 else []),
        f"-isystem{torch_directory / 'include'}",
    ]
    commands = []
    for source in [ROOT / "csrc/bindings.cpp", *sorted((ROOT / "csrc/cpu").glob("*.cpp"))]:
        own = X86_FLAGS.get(source.name, [])
        if (own and not x86) or (source.name in DOT_BFLOAT16_ONLY and not dot_bfloat16):
            continue
        commands.append((source, [*flags, *own]))
    return commands


def build_with_ninja(ninja: str, directory: Path, compiler: str, commands, link: list[str]) -> None:
    """Only what changed is compiled again."""

    def escape(text) -> str:
        return str(text).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    lines = [
        "rule compile",
        f"  command = {compiler} -MMD -MF $out.d $flags -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {compiler} -shared $in -o $out {' '.join(link)}",
    ]
    objects = []
    for source, flags in commands:
        objects.append(f"{source.stem}.o")
        lines += [f"build {objects[-1]}: compile {escape(source)}", f"  flags = {' '.join(flags)}"]
    lines += [f"build {LIBRARY}: link {' '.join(objects)}", ""]
    (directory / "build.ninja").write_text("\n".join(lines))
    run([ninja, "-C", str(directory)])


def build_one_by_one(directory: Path, compiler: str, commands, link: list[str]) -> None:
    """The same without ninja."""
    objects = []
    for source, flags in commands:
        objects.append(str(directory / f"{source.stem}.o"))
        run([compiler, *flags, "-c", str(source), "-o", objects[-1]])
    run([compiler, "-shared", *objects, "-o", str(directory / LIBRARY), *link])


def run(command: list[str]) -> None:
    """Run a compiler; its first error line becomes the reason."""
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        output = result.stdout + result.stderr
        print(output)
        errors = [line for line in output.splitlines() if "error" in line.lower()]
        raise CannotBuild(f"{Path(command[0]).name} failed: {(errors or output.splitlines() or ['no output'])[0]}")


def build_library(directory: Path) -> dict:
    """Build into ``directory``. Returns what was used, for the report."""
    if os.environ.get("MFT_BUILD") == "0":
        raise CannotBuild("the build was skipped: MFT_BUILD=0")
    version, torch_directory = find_torch()
    compiler = find_compiler()
    directory.mkdir(parents=True, exist_ok=True)
    commands = compile_commands(compiler, torch_directory)
    link = [f"-L{torch_directory / 'lib'}", "-ltorch_cpu", "-ltorch"]
    if ninja := shutil.which("ninja"):
        build_with_ninja(ninja, directory, compiler, commands, link)
    else:
        build_one_by_one(directory, compiler, commands, link)
    first_line = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout.splitlines()[0]
    return {"built": True, "reason": None, "compiler": first_line, "torch": version}


class BuildLibrary(build_ext):
    """Builds the library beside the package's Python files, and never fails the install unless MFT_BUILD=1."""

    def run(self) -> None:
        target = ROOT / "mft_kernels" if self.inplace else Path(self.build_lib, "mft_kernels")
        directory = Path(self.build_temp, "csrc").resolve()
        target.mkdir(parents=True, exist_ok=True)
        library = target / LIBRARY
        try:
            report = build_library(directory)
        except CannotBuild as reason:
            if os.environ.get("MFT_BUILD") == "1":
                raise
            report = {"built": False, "reason": str(reason)}
            library.unlink(missing_ok=True)
            print(f"mft_kernels: pure Python install, no C++ library: {reason}")
        else:
            # A new file, not new contents: a process may have the old one mapped.
            library.unlink(missing_ok=True)
            shutil.copy(directory / LIBRARY, library)
            print(f"mft_kernels: built {library} ({report['compiler']}, torch {report['torch']})")
        (target / REPORT).write_text(json.dumps(report, indent=2) + "\n")

    def get_outputs(self) -> list[str]:
        built = [Path(self.build_lib, "mft_kernels", name) for name in (LIBRARY, REPORT)]
        return [str(path) for path in built if path.exists()]

    def get_output_mapping(self) -> dict[str, str]:
        return {}  # in an editable install the library already lies beside the package's files


setup(
    packages=["mft_kernels", "mft_kernels.triton", "mft"],
    package_dir={"mft_kernels": "mft_kernels", "mft": "python/mft"},
    package_data={"mft": ["configs/*.yaml", "templates/*.jinja"]},
    ext_modules=[Extension("mft_kernels.libmft_cpu", sources=[])],
    cmdclass={"build_ext": BuildLibrary},
)
