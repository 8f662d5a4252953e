"""Measure how much CPU time this process can get now: whether other work, or too many threads, slows it down.

A load average needs a minute to rise, and also counts processes that wait for a disk. Here each thread hashes bytes for
a moment, which does not hold Python's lock, and its CPU time is compared with the wall time.
"""

import hashlib
import math
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

SECONDS = 0.2  # 50 time slices of a scheduler with slices of 4 ms
BUSY = 0.9  # share of a core: 0.98 and more on an idle 2-core machine, 0.5 to 0.8 with one other process on it
BLOCK = bytes(1 << 20)  # about 1 ms of hashing: between two blocks a thread needs Python's lock for a microsecond


@dataclass(frozen=True)
class Contention:
    """The CPU time of each thread: ``shares[i]`` is CPU time over wall time, 1.0 for a core of its own."""

    shares: tuple[float, ...]

    @property
    def threads(self) -> int:
        """The number of threads that were measured."""
        return len(self.shares)

    @property
    def cores(self) -> float:
        """The CPU time that the threads got together, in cores: at most ``threads``."""
        return sum(self.shares)

    @property
    def is_busy(self) -> bool:
        """Whether some thread had to wait for a core. A product of many threads ends with its slowest thread."""
        return min(self.shares) < BUSY

    @property
    def free_threads(self) -> int:
        """The number of threads for which a core is free, at least 1: ``threads`` unless the machine is busy."""
        return max(1, math.floor(self.cores)) if self.is_busy else self.threads

    def __str__(self) -> str:
        """Return a text such as ``2 threads get 1.3 cores``."""
        return f"{self.threads} thread{'s' * (self.threads != 1)} get{'s' * (self.threads == 1)} {self.cores:.1f} cores"


def core_share(threads: int, *, seconds: float = SECONDS) -> Contention:
    """Keep ``threads`` threads busy for ``seconds`` and return the share of a core that each one got.

    Call it while nothing else runs in this process. Raises: ValueError if threads or seconds is not positive.
    """
    if threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}; pass torch.get_num_threads()")
    if not seconds > 0:
        raise ValueError(f"seconds must be positive, got {seconds}; {SECONDS} is enough")
    with ThreadPoolExecutor(threads) as pool:
        return Contention(tuple(pool.map(_share_of_one_thread, [seconds] * threads)))


def _share_of_one_thread(seconds: float) -> float:
    begin, spent = time.perf_counter(), time.thread_time()
    while time.perf_counter() - begin < seconds:
        hashlib.sha256(BLOCK)
    return min(1.0, (time.thread_time() - spent) / (time.perf_counter() - begin))
