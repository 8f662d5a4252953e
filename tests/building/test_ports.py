"""The CPU library with other compilers and for other processors: what `make ports` checks, and a part of it."""

import fcntl
import platform
from pathlib import Path

import pytest

from building import compile, cpu, ports
from building.compile import CannotBuild, Unit

ROOT = Path(__file__).parents[2]


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
