"""Run tests on the CPU library under a sanitizer: python -m building.sanitized address | thread [PYTEST ...]

address: AddressSanitizer and UndefinedBehaviorSanitizer; the first report ends the run. thread: ThreadSanitizer; the
library then uses plain threads (csrc/cpu/parallel.h), whose start and end it sees. Python and torch are not
instrumented: what they do with their own memory is not checked. Needs g++ and its sanitizers' libraries.
"""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from . import cpu, ports
from .compile import CannotBuild, find_compiler

ROOT = Path(__file__).resolve().parent.parent
TESTS = ["-o", "addopts=", *ports.TESTS]
# Under a sanitizer the unrolled kernels for few tokens take minutes per file with -O3, and 16 s with -O1.
_COMMON = ["-O1", "-g", "-fno-omit-frame-pointer"]


@dataclass(frozen=True)
class Sanitizer:
    """Flags of compiler and linker, libraries to load before Python, and the sanitizer's own options."""

    flags: list[str]
    preload: list[str]
    environment: dict[str, str]


SANITIZERS = {
    "address": Sanitizer(
        ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", *_COMMON],
        ["libasan.so", "libubsan.so", "libstdc++.so"],
        # Python and torch keep much memory until the process ends, which is not a leak of ours. With use after return,
        # GCC 12 puts vectors of 64 bytes at unaligned addresses (its bug 110027).
        {
            "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1:detect_stack_use_after_return=0",
            "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
        },
    ),
    "thread": Sanitizer(
        ["-fsanitize=thread", "-DMFT_OWN_THREADS", *_COMMON],
        ["libtsan.so", "libstdc++.so"],
        {"TSAN_OPTIONS": "halt_on_error=1:exitcode=66:ignore_noninstrumented_modules=1"},
    ),
}


def main() -> None:
    """Build, run, and exit with pytest's exit code."""
    if len(sys.argv) < 2 or sys.argv[1] not in SANITIZERS:
        sys.exit(f"the sanitizer must be one of {', '.join(SANITIZERS)}, got {' '.join(sys.argv[1:]) or 'none'}")
    name, tests = sys.argv[1], sys.argv[2:] or TESTS
    sanitizer = SANITIZERS[name]
    directory = ROOT / "build" / "sanitized" / name
    cpu.build_cpu(directory, ROOT / "csrc", sanitizer.flags)
    environment = {
        **os.environ,
        **sanitizer.environment,
        "LD_PRELOAD": " ".join(_library(library) for library in sanitizer.preload),
        "MFT_CPU_LIBRARY": str(directory / cpu.LIBRARY),
    }
    # Without randomised addresses, because the kernel may otherwise place Python where the shadow memory must be.
    fixed = ["setarch", "-R"]
    cpu.library_capabilities(environment, fixed)
    command = [*fixed, sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *tests]
    sys.exit(subprocess.run(command, cwd=ROOT, env=environment).returncode)


def _library(name: str) -> str:
    found = subprocess.run([find_compiler(), f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
    if not Path(found).is_absolute():
        raise CannotBuild(f"the compiler must come with {name}, it has none: install g++ with its sanitizers")
    return str(Path(found).resolve())


if __name__ == "__main__":
    main()
