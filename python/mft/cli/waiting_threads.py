"""How long threads that wait for others spin, on a machine whose cores are busy."""

import os

from mft.contention import core_share
from mft.tracking.console import say


def let_waiting_threads_sleep() -> None:
    """On a busy machine, make libgomp's waiting threads sleep after a short spin. Call it before torch is loaded.

    By default they spin for milliseconds, while another process may hold the core of the thread that they wait for: 2
    threads of mft train then took 17 times as long as one. On free cores the long spin is a tenth faster, so it stays
    (SmolLM2-135M, Zen 4).
    """
    if {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        return
    asked = os.environ.get("OMP_NUM_THREADS", "")
    threads = int(asked) if asked.isdecimal() and int(asked) else len(os.sched_getaffinity(0))
    if threads > 1 and (found := core_share(threads)).is_busy:
        os.environ["GOMP_SPINCOUNT"] = "1000"
        say(f"{found}, other processes use the rest: waiting threads sleep early (GOMP_SPINCOUNT=1000)", style="yellow")
