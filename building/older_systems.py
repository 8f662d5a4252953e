"""Link a library so that it loads on systems with an older glibc than this one's, down to that of manylinux_2_28.

glibc 2.34 moved threads and dynamic loading into libc.so under new versions. The old versions still exist, but a linker
takes the newest. CUDA's static runtime, which is not compiled here, uses 46 of these names. So each such name goes
through a jump that names the old version. csrc/older_systems.cpp has the functions that did not exist at all.
"""

import platform
import re
import subprocess
from dataclasses import replace
from pathlib import Path

from .compile import CannotBuild, Link, Unit, build

Version = tuple[int, ...]

OLDEST: Version = (2, 28)
JUMP = """
.hidden __wrap_{name}
.globl __wrap_{name}
.type __wrap_{name}, @function
.symver older_{name}, {name}@GLIBC_{version}
__wrap_{name}:
    endbr64
    jmp *older_{name}@GOTPCREL(%rip)
.size __wrap_{name}, . - __wrap_{name}
"""


def build_for_older(directory: Path, units: list[Unit], link: Link, jobs: int | None = None) -> str | None:
    """Build as compile.build does. If the library needs a newer glibc than OLDEST, link it again with jumps.

    Returns: the glibc that it needs, such as "2.17"; None if libc is another. Raises: CannotBuild.
    """
    build(directory, units, link, jobs)
    wanted = glibc_names(directory / link.library)
    newer = {name for name, version in wanted.items() if version > OLDEST}
    if newer and platform.machine() == "x86_64":
        asked = subprocess.run([link.compiler, "-print-file-name=libc.so.6"], capture_output=True, text=True)
        older = older_versions(Path(asked.stdout.strip()))
        jumps = {name: version for name, version in older.items() if name in newer}
        source = directory / "older_systems.S"
        source.write_text(assembler(jumps))
        flags = [*link.flags, *(f"-Wl,--wrap={name}" for name in jumps)]
        build(directory, [*units, Unit(source, link.compiler, [])], replace(link, flags=flags), jobs)
        wanted = glibc_names(directory / link.library)
    return ".".join(map(str, max(wanted.values()))) if wanted else None


def glibc_names(library: Path) -> dict[str, Version]:
    """Return {each name that the library takes from glibc: its version there}."""
    found = re.findall(r"\*UND\*\s+\w+\s+\(?GLIBC_([\d.]+)\)? (\S+)$", _symbols(library), re.MULTILINE)
    return {name: _version(version) for version, name in found}


def older_versions(libc: Path) -> dict[str, str]:
    """Return {each name that libc offers to programs linked with OLDEST: its newest version among these}."""
    found: dict[str, str] = {}
    for version, name in re.findall(r"\.text\s+\w+\s+\(?GLIBC_([\d.]+)\)?\s+(\S+)$", _symbols(libc), re.MULTILINE):
        if _version(version) <= OLDEST and _version(version) >= _version(found.get(name, "0")):
            found[name] = version
    return found


def assembler(versions: dict[str, str]) -> str:
    """Return a jump __wrap_NAME to that version of each NAME; the linker's --wrap=NAME leads there."""
    jumps = (JUMP.format(name=name, version=version) for name, version in sorted(versions.items()))
    return "".join([".text\n", *jumps, '.section .note.GNU-stack, "", @progbits\n'])


def _version(text: str) -> Version:
    return tuple(map(int, text.split(".")))


def _symbols(library: Path) -> str:
    """Return the library's dynamic symbols, listed by binutils, which come with every linker."""
    ran = subprocess.run(["objdump", "-T", str(library)], capture_output=True, text=True)
    if ran.returncode != 0:
        raise CannotBuild(f"objdump -T {library} failed: {ran.stderr.strip()}")
    return ran.stdout
