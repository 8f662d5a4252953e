"""The CPU library with other compilers and for other processors: what `make ports` checks, and a part of it."""

import fcntl
import os
import platform
from pathlib import Path

import pytest

from building import compile, cpu, ports
from building.compile import CannotBuild, Unit

ROOT = Path(__file__).parents[2]


def tool(folder: Path, name: str, target: str | None = None) -> None:
    path = folder / name
    if target:
        path.symlink_to(folder / target)
    else:
        path.write_text("#!/bin/sh\n")
        path.chmod(0o755)


def test_each_compiler_is_found_once_the_oldest_first(tmp_path):
    for name in ("x86_64-linux-gnu-g++-12", "x86_64-linux-gnu-g++-9", "llvm-14", "llvm-22", "clang++-format", "c++"):
        tool(tmp_path, name)
    for name, target in (
        ("g++", "x86_64-linux-gnu-g++-12"),
        ("g++-12", "x86_64-linux-gnu-g++-12"),
        ("g++-9", "x86_64-linux-gnu-g++-9"),
        ("clang++-22", "llvm-22"),
        ("clang++-14", "llvm-14"),
        ("clang++", "llvm-22"),
    ):
        tool(tmp_path, name, target)
    found = ports.compilers(f"{tmp_path}{os.pathsep}{tmp_path / 'not there'}")
    assert [Path(path).name for path in found] == ["g++-9", "g++", "clang++-14", "clang++"]


def test_aarch64_is_a_port_where_cross_compiler_and_emulator_are(tmp_path):
    for name in ("g++", "clang++-14", "clang++-22", "aarch64-linux-gnu-g++"):
        tool(tmp_path, name)
    assert [port.name for port in ports.ports(str(tmp_path))] == ["g++", "clang++-14", "clang++-22"]
    tool(tmp_path, "qemu-aarch64-static")
    found = ports.ports(str(tmp_path))[3:]
    assert [port.name for port in found] == ["aarch64", "aarch64-clang++-22"]
    assert all(port.emulator == str(tmp_path / "qemu-aarch64-static") for port in found)


def test_what_is_missing_is_told_with_its_package(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    tool(tmp_path, "g++")
    lines = ports.missing()
    assert [line.split(" ")[0] for line in lines] == ["clang++", "aarch64-linux-gnu-g++", "qemu-aarch64"]
    assert lines[-1].endswith("apt-get install qemu-user")
    tool(tmp_path, "clang++-19")
    tool(tmp_path, "qemu-aarch64-static")
    assert [line.split(" ")[0] for line in ports.missing()] == ["aarch64-linux-gnu-g++"]


def test_an_aarch64_build_takes_every_file_that_is_for_any_machine():
    units = cpu.units("no compiler is asked", Path("torch"), ports.SOURCES, "aarch64")
    names = {unit.source.name for unit in units}
    assert {"bindings.cpp", "linear.cpp", "row_kernels_portable.cpp", "step_kernels_portable.cpp"} <= names
    assert not [flag for unit in units for flag in unit.flags if flag.startswith(("-m", "-DMFT_X86", "-DMFT_DOT"))]
    assert names.isdisjoint(cpu.X86_FLAGS)


def test_a_function_that_the_linker_may_give_to_other_files_is_seen(tmp_path):
    compiler = compiler_or_skip()
    source = tmp_path / "kernel.cpp"
    source.write_text(
        "static __attribute__((noinline)) int own(int a) { return a * a; }\n"
        "__attribute__((noinline)) inline int shared_one(int a) { return a + own(a); }\n"
        "int kernel(int a) { return shared_one(a); }\n"
    )
    instruction_set = [] if platform.machine() != "x86_64" else ["-mavx2"]
    units = [Unit(source, compiler, ["-O2", *instruction_set])]
    compile.build(tmp_path / "build", units)
    found = ports.shared_functions(tmp_path / "build", units)
    assert found == (["kernel.cpp: shared_one(int)"] if instruction_set else [])


def test_a_warning_that_ends_a_build_is_its_reason(tmp_path):
    source = tmp_path / "unused.cpp"
    source.write_text("static int nobody_calls_it() { return 1; }\n")
    with pytest.raises(CannotBuild, match="nobody_calls_it"):
        compile.build(tmp_path / "build", [Unit(source, compiler_or_skip(), ["-Wall", "-Werror"])])


def test_a_checksum_that_differs_is_named():
    expected = "0123456789abcdef  pack fp32\n00000000000000ff  pack bf16\n"
    assert ports.differences(expected, expected) == []
    assert ports.differences(expected.replace("ff", "fe"), expected) == [
        "pack bf16 gives 00000000000000fe, expected 00000000000000ff"
    ]
    assert ports.differences("", expected)[0] == "pack fp32 gives nothing, expected 0123456789abcdef"
    assert ports.differences(expected, "")[1] == "pack bf16 gives 00000000000000ff, expected nothing"


def test_portable_kernels_compute_what_every_build_has_to():
    compiler = compiler_or_skip()
    port, folder = ports.Port("here", compiler, "portable"), ROOT / "build" / "portable_kernels"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two test runs build one after the other
        # -O3 takes 1.5 times as long and gives the same. With ninja, only changed files are compiled again.
        program = ports.build_driver(port, folder, ["-O1", "-w"])
    assert ports.differences(ports.run(port, program, "portable"), ports.CHECKSUMS.read_text()) == []
    with pytest.raises(ports.Failed, match="MFT_CPU_CAPABILITY must be one of portable on this machine, got 'avx2'"):
        ports.run(port, program, "avx2")


def compiler_or_skip() -> str:
    try:
        return compile.find_compiler()
    except CannotBuild as reason:
        pytest.skip(str(reason))
