"""What a few lines of Python take at most, in a process of their own that may not take more."""

import subprocess
import sys
from dataclasses import dataclass

_WATCHED = """
import resource, sys, time
{before}
begun, known = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
{lines}
    said = "read"
except ValueError as error:
    said = str(error)
took = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - known
print(said, took * 1024, time.process_time() - begun, sep="\\n")
"""


@dataclass(frozen=True)
class Taken:
    """bytes: at most, beyond what imports took; seconds: of CPU time.

    said: what they printed, and then a ValueError's words, or "read".
    """

    bytes: int
    seconds: float
    said: str


def peak_of(before: str, lines: str) -> Taken:
    """What the lines took after those before them, which import."""
    program = _WATCHED.format(before=before, lines="\n".join(f"    {line}" for line in lines.splitlines()))
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr
    *said, size, seconds = run.stdout.splitlines()
    return Taken(int(size), float(seconds), "\n".join(said))
