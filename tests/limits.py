"""For readers of damaged files: damages, and limits of CPU seconds, and of memory in a process of its own."""

import contextlib
import random
import signal
import struct
import subprocess
import sys
from dataclasses import dataclass

_WATCHED = """
import time
def peak():  # of this program alone: getrusage has that of the process it was started by too
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
{before}
begun, known = time.process_time(), peak()
try:
{lines}
    said = "read"
except ValueError as error:
    said = str(error)
print(said, (peak() - known) * 1024, time.process_time() - begun, sep="\\n")
"""


@dataclass(frozen=True)
class Taken:
    """The resources that a program took. bytes: at most, beyond what the imports took; seconds: of CPU time.

    said: what the program printed, then the message of a ValueError, or "read".
    """

    bytes: int
    seconds: float
    said: str


def peak_of(before: str, lines: str) -> Taken:
    """Return what ``lines`` took in a new process, after ``before``, which contains the imports."""
    program = _WATCHED.format(before=before, lines="\n".join(f"    {line}" for line in lines.splitlines()))
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr
    *said, size, seconds = run.stdout.splitlines()
    return Taken(int(size), float(seconds), "\n".join(said))


@contextlib.contextmanager
def cpu_seconds(limit):
    """End the block with an error after ``limit`` CPU seconds, or after ten times as many on the clock, if it waits."""

    def end(number, frame):
        raise AssertionError(f"not done after {limit} CPU seconds: {signal.Signals(number).name}")

    timers = {signal.ITIMER_VIRTUAL: (signal.SIGVTALRM, limit), signal.ITIMER_REAL: (signal.SIGALRM, 10 * limit)}
    before = {number: signal.signal(number, end) for number, _ in timers.values()}
    for timer, (_, seconds) in timers.items():
        signal.setitimer(timer, seconds)
    try:
        yield
    finally:
        for timer in timers:
            signal.setitimer(timer, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


def assert_named(error, path, what=""):
    """Assert that an error's message names the file."""
    assert str(path) in str(error), what


def damages(content, header, count):
    """Yield ``count`` damaged copies, most of them in the header: (what was done, the bytes)."""
    chance = random.Random(0)
    eights = [b"\xff" * 8, bytes(8), struct.pack("<Q", 1 << 40), struct.pack("<Q", 1 << 31)]
    for number in range(count):
        damaged, place = bytearray(content), chance.randrange(header if number % 4 else len(content))
        what = ("cut off", "flipped", "set", "count", "removed", "inserted")[number % 6]
        if what == "cut off":
            del damaged[place:]
        elif what == "flipped":
            damaged[place] ^= 1 << chance.randrange(8)
        elif what == "set":
            damaged[place] = chance.randrange(256)
        elif what == "count":
            damaged[place : place + 8] = chance.choice(eights)
        elif what == "removed":
            del damaged[place : place + chance.randrange(1, 9)]
        else:
            damaged[place:place] = chance.randbytes(chance.randrange(1, 9))
        yield f"{number}: {what} at {place}", bytes(damaged)
