"""Whether the threads of a run on a CPU get their cores: said once, with what to do.

Threads wait for each other at the end of each product, so one that other processes keep from its core holds up all.
Nothing is changed by this. The number of threads decides the last bits of a run, so it is the user's to choose.
"""

import time

import torch

from mft.contention import Contention, core_share
from mft.engines.distributed import Processes
from mft.engines.start import default_device
from mft.tracking.console import say

SHORTEST = 1.0  # seconds of work that tell how fast it goes
SLOW = 1.3  # times as long as on free cores: worth a line


class CoreWatch:
    """Compares the time on the wall with the CPU time of the thread that drives the work.

        watch.begin()
        ...                     # an evaluation, or a step
        watch.look("a step")    # says so if the cores are busy; the next piece of work begins here

    A wait for a disk looks like one for a core, so what is slow is measured before it is called so. Each measurement
    takes 0.2 seconds, and the work between two of them doubles: it costs a few percent at most.
    """

    def __init__(self, *, on: bool = True) -> None:
        self._on, self._least = on, SHORTEST

    @classmethod
    def of(cls, processes: Processes) -> "CoreWatch":
        """Off on a GPU, for which the CPU waits, and where several processes wait for each other."""
        return cls(on=processes.count == 1 and default_device().type == "cpu")

    def begin(self) -> None:
        """What is looked at next begins here."""
        self._wall, self._cpu = time.perf_counter(), time.thread_time()

    def look(self, what: str) -> None:
        """Judge what was done since, if that was long enough; what: its name in the line."""
        wall = time.perf_counter() - self._wall
        if not self._on or wall < self._least:
            return
        slower = wall / max(time.thread_time() - self._cpu, 1e-9)
        if slower > SLOW:
            found = core_share(torch.get_num_threads())
            if found.is_busy:
                say(said_of(what, slower, found), style="yellow")
                self._on = False
        self._least *= 2
        self.begin()


def said_of(what: str, slower: float, found: Contention) -> str:
    """The line."""
    line = (
        f"warning: {what} takes about {slower:.1f} times as long as on free cores: {found}, other processes use the "
        "rest; end these"
    )
    if found.free_threads == found.threads:
        return line
    return f"{line}, or stop this run and set OMP_NUM_THREADS={found.free_threads} (see docs/how-to/checkpoints.md)"
