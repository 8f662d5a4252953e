"""Find how the compiled kernels would be launched: their threads, and the shared memory that only a launch decides.

The objects are linked with a recording runtime (cuda_runtime.cpp) and with calls of every kind (cuda_calls.cpp). When
the program runs, the host code of each object shows what it would do on each GPU.
"""

import re
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from building.compile import find_compiler

_HERE = Path(__file__).parent
_ROOT = _HERE.parents[1]


@dataclass(frozen=True)
class Launch:
    """A launch; ``shared``: bytes that it asks for."""

    threads: int
    shared: int


def launches(objects: Sequence[Path]) -> dict[str, dict[int, Launch]]:
    """Return {symbol: {capability: the launch with most shared memory}}.

    Raises: ValueError if the objects cannot be linked, or a call says that it cannot launch.
    """
    with tempfile.TemporaryDirectory() as directory:
        program = Path(directory, "calls")
        sources = [_HERE / "cuda_runtime.cpp", _HERE / "cuda_calls.cpp"]
        flags = ["-std=c++17", "-Wall", "-Wextra", f"-I{_ROOT / 'csrc/cuda'}"]
        _output([find_compiler(), *flags, *map(str, [*sources, *objects]), "-ldl", "-o", str(program)])
        return parse(_output([str(program)]))


def parse(text: str) -> dict[str, dict[int, Launch]]:
    """Parse the output of cuda_runtime.cpp."""
    found: dict[str, dict[int, Launch]] = defaultdict(dict)
    for line in text.splitlines():
        kind, capability, *rest = line.split()
        if kind != "launch":
            raise ValueError(f"every call must launch, got {' '.join(rest)!r} for {int(capability) / 10}")
        symbol, threads, shared = rest[0], int(rest[1]), int(rest[2])
        before = found[symbol].get(int(capability))
        if before is None or before.shared < shared:
            found[symbol][int(capability)] = Launch(threads, shared)
    return dict(found)


def _output(command: list[str]) -> str:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        lines = result.stderr.splitlines() or [f"exit code {result.returncode}"]
        reason = next((line for line in lines if re.search(r"error|undefined", line)), lines[0])
        raise ValueError(f"the objects must link with cuda_runtime.cpp and run: {reason}")
    return result.stdout
