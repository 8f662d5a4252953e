"""A run on busy cores says so once, with a remedy; a run with free cores, or waiting for a disk, says nothing."""

import os
import subprocess
import sys

import pytest

from mft.contention import Contention
from mft.engines.distributed import Processes
from mft.training import core_watch
from mft.training.core_watch import CoreWatch

FREE, BUSY = Contention((1.0, 0.99)), Contention((0.5, 0.45))


class Work:
    """Clocks that advance only with the work done, and a count of how often the cores were measured."""

    def __init__(self, monkeypatch, cores):
        self.wall = self.cpu = 0.0
        self.measured, self.said = 0, []
        self.cores = cores
        monkeypatch.setattr(core_watch.time, "perf_counter", lambda: self.wall)
        monkeypatch.setattr(core_watch.time, "thread_time", lambda: self.cpu)
        monkeypatch.setattr(core_watch, "core_share", self._share)
        monkeypatch.setattr(core_watch, "say", lambda line, style: self.said.append(line))

    def _share(self, threads):
        self.measured += 1
        return self.cores

    def steps(self, watch, count, wall, cpu):
        for _ in range(count):
            self.wall += wall
            self.cpu += cpu
            watch.look("a step")


def started():
    watch = CoreWatch()
    watch.begin()
    return watch


@pytest.mark.parametrize(
    ("cores", "steps", "wall", "cpu", "measured", "said"),
    [
        (BUSY, 20, 2.0, 0.5, 1, "warning: a step takes about 4.0 times as long as on free cores: 2 threads get 0.9 "),
        (Contention((0.5,)), 1, 2.0, 1.0, 1, "1 thread gets 0.5 cores, other processes use the rest; end these"),
        (BUSY, 40, 1.0, 0.95, 0, None),  # at full speed nothing is measured
        (FREE, 40, 1.0, 0.1, 5, None),  # it waits for a disk: measured after 1, 2, 4, 8 and 16 seconds
    ],
    ids=["busy", "one thread", "full speed", "a slow disk"],
)
def test_busy_cores_are_said_once_and_free_cores_and_slow_disks_never(
    monkeypatch, cores, steps, wall, cpu, measured, said
):
    work = Work(monkeypatch, cores)
    work.steps(started(), steps, wall=wall, cpu=cpu)
    assert work.measured == measured
    assert [said in line for line in work.said] == [True] * (said is not None)
    remedy = "end these, or stop this run and set OMP_NUM_THREADS=1 (see docs/how-to/reporting.md)"
    assert [line.endswith(remedy) for line in work.said] == [cores is BUSY] * len(work.said)


def test_short_steps_are_judged_together(monkeypatch):
    work = Work(monkeypatch, BUSY)
    watch = started()
    work.steps(watch, 9, wall=0.1, cpu=0.03)
    assert work.measured == 0
    work.steps(watch, 2, wall=0.1, cpu=0.03)
    assert len(work.said) == 1


def test_several_processes_which_wait_for_each_other_are_not_watched(monkeypatch):
    work = Work(monkeypatch, BUSY)
    watch = CoreWatch(Processes(0, 2))
    watch.begin()
    work.steps(watch, 3, wall=2.0, cpu=0.1)
    assert work.measured == 0


@pytest.mark.parametrize(
    ("share", "set_by_user", "spins"),
    [
        (0.5, {}, "1000"),
        (1.0, {}, "None"),
        (0.5, {"OMP_NUM_THREADS": "1"}, "None"),
        (0.5, {"GOMP_SPINCOUNT": "7"}, "7"),
        (0.5, {"OMP_WAIT_POLICY": "active"}, "None"),
    ],
)
def test_on_busy_cores_waiting_threads_sleep_before_torch_is_loaded(share, set_by_user, spins):
    code = (
        "import os, sys, mft.cli.waiting_threads as waiting; from mft.contention import Contention; "
        f"waiting.core_share = lambda threads: Contention(({share},) * threads); waiting.let_waiting_threads_sleep(); "
        "assert 'torch' not in sys.modules; print(os.environ.get('GOMP_SPINCOUNT'))"
    )
    ours = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_NUM_THREADS")
    outside = {key: value for key, value in os.environ.items() if key not in ours} | {"OMP_NUM_THREADS": "2"}
    found = subprocess.run([sys.executable, "-c", code], env=outside | set_by_user, capture_output=True, text=True)
    assert found.stdout.split()[-1] == spins, found.stderr
