"""Warn once if other processes occupy the cores of a run on a CPU, and say what to do.

Threads wait for each other at the end of each matrix product. If other processes keep one thread from its core, all
threads wait for it. The run itself is not changed: the number of threads decides the last bits of the result, so the
user must choose it.
"""

import time

import torch

from mft.contention import Contention, core_share
from mft.engines.distributed import ALONE, Processes
from mft.engines.mode import default_device
from mft.tracking.console import say

SHORTEST = 1.0  # seconds of work that are enough to judge its speed
SLOW = 1.3  # warn if the work takes this many times as long as on free cores


class CoreWatch:
    """Compares the wall time with the CPU time of the thread that drives the work, from begin() or look() to look().

    A wait for a disk looks like a wait for a core. So before a warning each thread's share of a core is measured, in
    0.2 seconds; the work between two measurements doubles.
    """

    def __init__(self, processes: Processes = ALONE) -> None:
        # Off on a GPU, where the CPU waits, and with several processes.
        self._on, self._least = processes.count == 1 and default_device().type == "cpu", SHORTEST

    def begin(self) -> None:
        """Start the measurement of the next piece of work."""
        self._wall, self._cpu = time.perf_counter(), time.thread_time()

    def look(self, what: str) -> None:
        """Judge the work since begin(), if it took long enough. what: the name of the work in the warning."""
        wall = time.perf_counter() - self._wall
        if not self._on or wall < self._least:
            return
        slower = wall / max(time.thread_time() - self._cpu, 1e-9)
        if slower > SLOW:
            found = core_share(torch.get_num_threads())
            if found.is_busy:
                say(busy_cores_warning(what, slower, found), style="yellow")
                self._on = False
        self._least *= 2
        self.begin()


def busy_cores_warning(what: str, slower: float, found: Contention) -> str:
    """Return the text of the warning."""
    line = (
        f"warning: {what} takes about {slower:.1f} times as long as on free cores: {found}, other processes use the "
        "rest; end these"
    )
    if found.free_threads == found.threads:
        return line
    return f"{line}, or stop this run and set OMP_NUM_THREADS={found.free_threads} (see docs/how-to/reporting.md)"
