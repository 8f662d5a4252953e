"""Build a shared object from source files. If ninja is available, only what changed is compiled again."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # the stable ABI of torch 2.11
CPP_FLAGS = ["-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", TORCH_TARGET]


class CannotBuild(Exception):
    """The reason why there is no library on this machine."""


@dataclass(frozen=True)
class Unit:
    """One file to compile. A change of a file in ``tools`` compiles it again."""

    source: Path
    compiler: str
    flags: Sequence[str]
    tools: Sequence[Path] = ()

    @property
    def object(self) -> str:
        return f"{self.source.name}.o"

    @property
    def log(self) -> str:
        """The file of the compiler's output, next to the object."""
        return f"{self.object}.log"


@dataclass(frozen=True)
class Link:
    """The shared object ``library``, made from every unit's object with ``flags``."""

    library: str
    compiler: str
    flags: Sequence[str]


def find_compiler() -> str:
    """Return the C++ compiler: $CXX, or g++, clang++ or c++."""
    wanted = os.environ.get("CXX")
    for name in [wanted] if wanted else ["g++", "clang++", "c++"]:
        if path := shutil.which(name):
            return path
    raise CannotBuild(f"no C++ compiler found ({wanted or 'g++, clang++, c++'}); install one, for instance g++")


def find_torch() -> tuple[str, Path]:
    """Return (version, directory) of the torch that runs this build."""
    try:
        import torch
    except ImportError as error:
        raise CannotBuild(
            f"torch is not importable while building ({error}); install torch, then pip install --no-build-isolation"
        ) from error
    return torch.__version__, Path(torch.__file__).parent


def find_ninja() -> str | None:
    """Return the ninja next to this Python, whose folder need not be in PATH, or the one in PATH.

    The order matters: a ninja of another version forgets what the first one has compiled, and compiles it all again.
    """
    return shutil.which("ninja", path=str(Path(sys.executable).parent)) or shutil.which("ninja")


def system_headers(folders: Sequence[Path]) -> list[str]:
    """Return flags for headers of others: no warnings from them, and no watching for changes."""
    return [flag for folder in folders for flag in ("-isystem", str(folder))]


def accepts(compiler: str, flags: list[str]) -> bool:
    """Whether the compiler knows ``flags``."""
    with tempfile.TemporaryDirectory() as directory:
        source = Path(directory, "empty.cpp")
        source.write_text("int main() {}\n")
        command = [compiler, *flags, "-c", str(source), "-o", str(Path(directory, "empty.o"))]
        return subprocess.run(command, capture_output=True).returncode == 0


def build(directory: Path, units: Sequence[Unit], link: Link | None = None, jobs: int | None = None) -> None:
    """Compile the units into ``directory``, and link them if asked; ``jobs`` at once, or as many as there are cores.

    Prints one line per file. Raises: CannotBuild with the first error.
    """
    directory.mkdir(parents=True, exist_ok=True)
    if ninja := find_ninja():
        (directory / "build.ninja").write_text(ninja_file(units, link))
        command = [ninja, "-C", str(directory), *(["-j", str(jobs)] if jobs else [])]
        _run(command, os.environ | {"NINJA_STATUS": "[%f/%t, %e s] "})
    else:
        _build_without_ninja(directory, units, link, jobs or os.cpu_count() or 1)


def ninja_file(units: Sequence[Unit], link: Link | None) -> str:
    """Return the text of build.ninja."""

    def escape(text: object) -> str:
        return str(text).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    def arguments(flags: Sequence[str]) -> str:
        return shlex.join(flags).replace("$", "$$")

    lines = [
        "rule compile",
        "  command = $compiler -MMD -MF $out.d $flags -c $in -o $out > $out.log 2>&1 || { cat $out.log; exit 1; }",
        "  description = $name",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        "  command = $compiler -shared $in -o $out $flags",
        "  description = $out",
    ]
    for unit in units:
        tools = "".join(f" {escape(tool)}" for tool in unit.tools)
        lines += [
            f"build {unit.object}: compile {escape(unit.source)}{' |' if tools else ''}{tools}",
            f"  compiler = {arguments([unit.compiler])}",
            f"  flags = {arguments(unit.flags)}",
            f"  name = {unit.source.name}",
        ]
    if link:
        lines += [
            f"build {link.library}: link {' '.join(unit.object for unit in units)}",
            f"  compiler = {arguments([link.compiler])}",
            f"  flags = {arguments(link.flags)}",
        ]
    return "\n".join([*lines, ""])


def _build_without_ninja(directory: Path, units: Sequence[Unit], link: Link | None, jobs: int) -> None:
    def compile_one(unit: Unit) -> None:
        start, target = time.monotonic(), directory / unit.object
        try:
            output = _run([unit.compiler, *unit.flags, "-c", str(unit.source), "-o", str(target)], show=False)
        except CannotBuild:
            print(f"{unit.source.name} failed")
            raise
        (directory / unit.log).write_text(output)
        print(f"[{time.monotonic() - start:.0f} s] {unit.source.name}", flush=True)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(compile_one, units))
    if link:
        objects = [str(directory / unit.object) for unit in units]
        _run([link.compiler, "-shared", *objects, "-o", str(directory / link.library), *link.flags])


def _run(command: list[str], environment: dict[str, str] | None = None, *, show: bool = True) -> str:
    """Run the command and return its output, shown as it comes. If it fails, its first error line is the reason."""
    lines: list[str] = []
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", env=environment
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line.rstrip("\n"))
            if show:
                print(lines[-1], flush=True)
    if process.returncode != 0:
        # Matches "nvcc fatal : ...", but not the -Werror of a command.
        errors = [line for line in lines if re.search(r"\berror|fatal", line.lower())]
        raise CannotBuild(f"{Path(command[0]).name} failed: {(errors or lines or ['no output'])[0]}")
    return "".join(f"{line}\n" for line in lines)
