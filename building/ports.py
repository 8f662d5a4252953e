"""Build the CPU library with each compiler here, and for aarch64: python -m building.ports [NAME ...] | --store

Each g++ and clang++ builds it into build/ports/NAME, with warnings as errors, and then:
  - no code for one instruction set may hold a function that the linker could use for all;
  - tests/cpu_kernels/checksums.cpp, linked with the kernels, prints tests/cpu_kernels/checksums.txt, on every
    instruction set of this processor;
  - tests/ops (without the public ops), tests/cpu_kernels/test_cpu.py and tests/kernels/test_reference_step.py pass.
aarch64: a cross compiler compiles every file (there is no aarch64 libtorch to link with), and the kernels print the
same checksums under an emulator. Nothing is installed: missing tools are named, with Debian's package.
--store writes checksums.txt, from the portable kernels.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from . import cpu
from .compile import CPP_FLAGS, CannotBuild, Unit, build, find_compiler, find_torch

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "csrc"
DRIVER = ROOT / "tests" / "cpu_kernels"
CHECKSUMS = DRIVER / "checksums.txt"
TESTS = ["tests/ops", "tests/cpu_kernels/test_cpu.py", "tests/kernels/test_reference_step.py"]
TESTS += ["-k", "not cuda and not triton and not _ops"]
# torch_on_host.cpp replaces these in the driver.
KNOWS_TORCH = (
    *(f"{of}bindings.cpp" for of in ("", "grouped_", "in_place_", "quantized_", "short_")),
    "torch_matmul.cpp",
)

AARCH64 = "aarch64"
CROSS_COMPILER = "aarch64-linux-gnu-g++"
EMULATORS = ("qemu-aarch64", "qemu-aarch64-static")
PACKAGES = {"g++": "g++", "clang++": "clang", CROSS_COMPILER: "g++-aarch64-linux-gnu", EMULATORS[0]: "qemu-user"}


class Failed(Exception):
    """What is wrong with a port."""


@dataclass(frozen=True)
class Port:
    """A compiler, its flags for ``machine``, and what runs its programs."""

    name: str
    compiler: str
    machine: str
    flags: Sequence[str] = ()
    emulator: str | None = None

    @property
    def directory(self) -> Path:
        return ROOT / "build" / "ports" / self.name


def main() -> None:
    """Make every possible port, or the named ones; exit code 1 if one fails."""
    arguments = sys.argv[1:]
    if arguments == ["--store"]:
        port = Port("store", find_compiler(), "portable")
        CHECKSUMS.write_text(run(port, build_driver(port, port.directory / "driver"), "portable"))
        return
    found = ports()
    if unknown := set(arguments) - {port.name for port in found}:
        sys.exit(f"the ports of this machine are {', '.join(p.name for p in found)}, got {', '.join(sorted(unknown))}")
    outcomes = {port.name: outcome(port) for port in found if not arguments or port.name in arguments}
    print("\nPorts of the CPU library:")
    for name, said in outcomes.items():
        print(f"  {name:24} {said}")
    for line in missing():
        print(f"  {line}")
    sys.exit(any(said.startswith("FAILED") for said in outcomes.values()))


def ports(path: str | None = None) -> list[Port]:
    """Return the ports that the tools in ``path`` allow, by default PATH."""
    native = platform.machine().lower()
    found = [Port(Path(compiler).name, compiler, native) for compiler in compilers(path or os.environ.get("PATH", ""))]
    cross = shutil.which(CROSS_COMPILER, path=path)
    emulator = next(filter(None, (shutil.which(name, path=path) for name in EMULATORS)), None)
    if cross and emulator:
        found.append(Port(AARCH64, cross, AARCH64, ["-static"], emulator))
        clangs = [port for port in found if port.name.startswith("clang++")]
        for newest in clangs[-1:]:  # uses the cross compiler's libraries
            flags = ["--target=aarch64-linux-gnu", "-static"]
            found.append(Port(f"{AARCH64}-{newest.name}", newest.compiler, AARCH64, flags, emulator))
    return found


def compilers(path: str) -> list[str]:
    """Return each g++ and clang++ of ``path`` once, by its shortest name, the oldest version first."""
    found: dict[Path, Path] = {}
    for folder in map(Path, path.split(os.pathsep)):
        names = folder.iterdir() if folder.is_dir() else []
        for tool in sorted(names, key=lambda tool: (len(tool.name), tool.name)):
            if re.fullmatch(r"(g|clang)\+\+(-\d+)?", tool.name) and os.access(tool, os.X_OK):
                best = found.setdefault(tool.resolve(), tool)
                if len(tool.name) < len(best.name):
                    found[tool.resolve()] = tool

    def order(item: tuple[Path, Path]) -> tuple[bool, int, str]:
        resolved, tool = item
        version = re.search(r"-(\d+)", resolved.name) or re.search(r"(\d+)", str(resolved))
        return tool.name.startswith("clang"), int(version[1]) if version else 0, str(tool)

    return [str(tool) for _, tool in sorted(found.items(), key=order)]


def missing() -> list[str]:
    """Return a line for each missing tool."""
    names = {Path(compiler).name.partition("-")[0] for compiler in compilers(os.environ.get("PATH", ""))}
    names |= {CROSS_COMPILER} if shutil.which(CROSS_COMPILER) else set()
    names |= {EMULATORS[0]} if any(map(shutil.which, EMULATORS)) else set()
    return [
        f"{tool:24} NOT FOUND, so nothing was tried with it: apt-get install {package}"
        for tool, package in PACKAGES.items()
        if tool not in names
    ]


def outcome(port: Port) -> str:
    """Return a port's result in one line."""
    print(f"\n---- {port.name}", flush=True)
    try:
        return check(port)
    except (CannotBuild, Failed) as error:
        return f"FAILED: {error}"


def check(port: Port) -> str:
    """Build and run; return what was done. Raises: CannotBuild, Failed."""
    first_line = subprocess.run([port.compiler, "--version"], capture_output=True, text=True).stdout.splitlines()[0]
    found = [replace(unit, flags=[*unit.flags, *port.flags, "-Werror"]) for unit in kernels(port, with_torch=True)]
    if port.emulator:
        build(port.directory, found)
        compare(port, build_driver(port, port.directory / "driver"), "portable")
        return f"{first_line}: {len(found)} files compiled, checksums equal under {Path(port.emulator).name}"
    cpu.build_cpu(port.directory, SOURCES, [*port.flags, "-Werror"], port.compiler)
    if shared := shared_functions(port.directory, found):
        raise Failed(f"the linker may take {shared[0]} for every instruction set; give it internal linkage")
    environment = os.environ | {"MFT_CPU_LIBRARY": str(port.directory / cpu.LIBRARY)}
    capabilities = cpu.library_capabilities(environment)
    driver = build_driver(port, port.directory / "driver")
    for capability in capabilities:
        compare(port, driver, capability)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "addopts=", *TESTS]
    if subprocess.run(command, cwd=ROOT, env=environment).returncode != 0:
        raise Failed(f"{' '.join(TESTS)} with MFT_CPU_LIBRARY={environment['MFT_CPU_LIBRARY']}")
    return f"{first_line}: tests passed, checksums equal on {', '.join(capabilities)}"


def kernels(port: Port, *, with_torch: bool) -> list[Unit]:
    """Return the library's files, all or those that need no torch."""
    torch_directory = find_torch()[1]
    found = cpu.units(port.compiler, torch_directory, SOURCES, port.machine)
    return [unit for unit in found if with_torch or unit.source.name not in KNOWS_TORCH]


def build_driver(port: Port, directory: Path, extra: Sequence[str] = ()) -> Path:
    """Build checksums.cpp with the kernels, on plain threads (csrc/cpu/parallel.h): a program that needs no torch."""
    flags = ["-DMFT_OWN_THREADS", *port.flags, *extra]
    found = [replace(unit, flags=[*unit.flags, *flags]) for unit in kernels(port, with_torch=False)]
    own = [*CPP_FLAGS, "-O1", "-ffp-contract=off", f"-I{SOURCES / 'cpu'}", *flags]
    found += [Unit(source, port.compiler, own) for source in sorted(DRIVER.glob("*.cpp"))]
    build(directory, found)
    program = directory / "checksums"
    objects = [str(directory / unit.object) for unit in found]
    linked = subprocess.run(
        [port.compiler, *objects, "-o", str(program), "-pthread", *port.flags], capture_output=True, text=True
    )
    if linked.returncode != 0:
        raise CannotBuild(f"{Path(port.compiler).name} cannot link {program.name}: {linked.stderr.strip()}")
    return program


def run(port: Port, program: Path, capability: str) -> str:
    """Run the program and return its output."""
    command = [*([port.emulator] if port.emulator else []), str(program)]
    environment = os.environ | {"MFT_CPU_CAPABILITY": capability}
    ran = subprocess.run(command, capture_output=True, text=True, env=environment)
    if ran.returncode != 0:
        raise Failed(f"{program} on {capability} ended with {ran.returncode}: {ran.stderr.strip()}")
    return ran.stdout


def compare(port: Port, program: Path, capability: str) -> None:
    """Compare with checksums.txt. Raises: Failed with the first kernel that computes something else."""
    print(f"checksums on {capability}", flush=True)
    if wrong := differences(run(port, program, capability), CHECKSUMS.read_text()):
        raise Failed(f"{len(wrong)} checksums differ on {capability}, the first: {wrong[0]}")


def differences(got: str, expected: str) -> list[str]:
    """Return the kernels that only one of the two outputs has, or that differ in their checksum."""
    here, there = ({line[18:]: line[:16] for line in text.splitlines()} for text in (got, expected))
    return [
        f"{kernel} gives {here.get(kernel, 'nothing')}, expected {there.get(kernel, 'nothing')}"
        for kernel in here | there
        if here.get(kernel) != there.get(kernel)
    ]


def shared_functions(directory: Path, units: Sequence[Unit]) -> list[str]:
    """Return functions of objects made with -m... that another object may replace by the same name, or the reverse."""
    found = []
    for unit in units:
        if any(flag.startswith("-m") for flag in unit.flags):
            command = ["nm", "--demangle", "--defined-only", str(directory / unit.object)]
            symbols = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            weak = re.findall(r"^\w+ [WVu] (.*)$", symbols, re.MULTILINE)
            found += [f"{unit.source.name}: {name}" for name in weak]
    return found


if __name__ == "__main__":
    main()
