"""Simulate mft compare --join with 1 to 64 processes on the stored study board-small: python -m benchmarks.joining.

The simulation has discrete events. The planner is the real one (mft_study.plan.ready), applied to what a process has
seen so far. A run takes the training seconds that the stored study measured, plus OVERHEAD. Not simulated: evaluation,
the test split, and shared processors.
"""

import argparse
import heapq
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from benchmarks.joining.board import run_of, study
from mft_study.outcome import Outcome, Unit
from mft_study.plan import ready
from mft_study.shared.leases import Pace

START = 10.0  # seconds from the command to the first claim: imports and the base model
OVERHEAD = 0.1  # seconds per unit: see benchmarks.joining.overhead
PACE = Pace()


@dataclass
class Found:
    """The result of a simulation. Seconds are summed over all processes, except makespan."""

    makespan: float = 0.0
    worked: float = 0.0
    lost: float = 0.0  # seconds in runs whose process was killed
    idle: float = 0.0
    looks: int = 0  # listings of the directory, its outcomes' folders and leases
    requests: int = 0  # files made, read, linked or removed
    killed: int = 0
    twice: int = 0  # runs that were done although another process had done them


@dataclass
class Simulation:
    """A simulation of ``workers`` processes. A killed process starts again after START seconds.

    delay: seconds until a process sees what another one wrote (NFS caches directories for up to 60).
    kills: expected kills per process and hour.
    """

    workers: int
    delay: float = 0.0
    kills: float = 0.0
    rng: random.Random = field(default_factory=lambda: random.Random(0))

    def __post_init__(self) -> None:
        self.found = Found()
        self._told: list[tuple[float, Outcome]] = []
        self._names: dict[Unit, float] = {}
        self._held: dict[Unit, float] = {}  # end of its lease: infinite while its holder is alive
        self._ready: dict[int, list[Unit]] = {}  # by the number of outcomes seen

    def run(self) -> Found:
        events = [(START, worker, None) for worker in range(self.workers)]
        heapq.heapify(events)
        while events:
            now, worker, done = heapq.heappop(events)
            if done is not None:
                self._tell(now, done)
            event = self._next(now)
            if event is not None:
                heapq.heappush(events, (event[0], worker, event[1]))
            self.found.makespan = max(self.found.makespan, now)
        return self.found

    def _tell(self, now: float, unit: Unit) -> None:
        self.found.requests += 4  # written, linked, weights linked, lease removed
        if unit in self._names:
            self.found.twice += 1
        else:
            self._names[unit] = now
            self._told.append((now, run_of(unit)[0]))
        self._held.pop(unit, None)

    def _next(self, now: float) -> tuple[float, Unit | None] | None:
        """Return when this process reports next and the unit it has then done, if any; None if nothing is left."""
        seen = sum(1 for at, _ in self._told if at + self.delay <= now)
        self.found.looks += 2
        if seen not in self._ready:
            self._ready[seen] = ready(study(), [outcome for _, outcome in self._told[:seen]])
        waiting = self._ready[seen]
        if not waiting:
            return None
        for unit in waiting:
            if self._held.get(unit, 0.0) > now:
                continue
            self.found.requests += 2  # made, and checked if it was done
            if unit in self._names:
                self.found.requests += 1
                continue
            return self._claim(now, unit)
        wait = PACE.look * self.rng.uniform(0.5, 1.5)
        self.found.idle += wait
        return now + wait, None

    def _claim(self, now: float, unit: Unit) -> tuple[float, Unit | None]:
        seconds = run_of(unit)[1] + OVERHEAD
        dies = self.rng.expovariate(self.kills / 3600) if self.kills else float("inf")
        self.found.requests += int(min(seconds, dies) / PACE.beat) * 2
        if dies < seconds:
            self.found.killed += 1
            self.found.lost += dies
            self._held[unit] = now + dies + PACE.expiry
            return now + dies + START, None
        self._held[unit] = float("inf")
        self.found.worked += seconds
        return now + seconds, unit


def longest_chain() -> float:
    """Return the seconds with as many processes as units: only dependencies limit it."""
    simulation = Simulation(workers=400)
    return simulation.run().makespan


def rows(workers: Sequence[int], delay: float, kills: float) -> list[str]:
    """Return one table line for each number of workers."""
    lines = []
    for count in workers:
        found = Simulation(count, delay, kills, random.Random(count)).run()
        whole = count * found.makespan
        rate = (found.looks + found.requests) / found.makespan
        cells = (
            f"{count}",
            f"{found.makespan / 60:.1f}",
            f"{100 * found.worked / whole:.0f} %",
            f"{100 * found.lost / whole:.1f} %",
            f"{found.killed}",
            f"{found.twice}",
            f"{rate:.0f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    given = parser.parse_args()
    for delay, kills, counts in ((0.0, 0.0, given.workers), (30.0, 0.0, [8, 64]), (0.0, 2.0, [8, 64])):
        print(f"\nresults are seen after {delay:g} s; {kills:g} kills per process and hour\n")
        print("| processes | minutes | at work | lost in kills | kills | done twice | requests per s |")
        print("|---:|---:|---:|---:|---:|---:|---:|")
        print("\n".join(rows(counts, delay, kills)), flush=True)
    print(f"\nthe longest chain of units: {longest_chain() / 60:.1f} minutes")


if __name__ == "__main__":
    main()
