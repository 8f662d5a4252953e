"""Checkpoints of a training run as it goes: every so many minutes, after its last step, and when it is told to stop.

SIGTERM and Ctrl-C (SIGINT) let the step end, save, and leave with exit code 128 + the signal's number: 143 or 130. A
second one leaves at once, and what the last checkpoint holds is kept.
"""

import contextlib
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from torch import Tensor

from mft.engines.distributed import ALONE, Processes
from mft.engines.step import Runner, StepReport
from mft.training.checkpoint import Checkpoint, check_space, prepare, write_checkpoint
from mft.training.row_source import RowSource
from mft.training.state import put_state, state_bytes, take_state

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(SystemExit):
    """Training was told to stop and has saved where it stood."""

    def __init__(self, number: int, step: int, steps: int, where: Path) -> None:
        super().__init__(128 + number)
        self.message = f"stopped by {signal.Signals(number).name} after step {step} of {steps}; saved: {where}"


class Counter(Protocol):
    """What hears of each step before the saver does, and counts from one step to a later one."""

    def take_state(self) -> dict[str, Tensor]: ...

    def put_state(self, tensors: Mapping[str, Tensor]) -> None: ...


class Saver:
    """What train_loop tells of each step.

    Args:
        root: directory of the checkpoints.
        minutes: between two; 0 saves after every step.
        found: continue from there.
        facts: kept in every checkpoint; those of found must be the same, unless force is True.
        run: gives what else every checkpoint keeps, for whoever goes on (Checkpoint.run).
        on_found: hears of the steps that found had done.
        processes: those that train together; the first one writes, each its rows where these are spread, and all go on
            from what was written.
        counters: go on with the run; their tensors lie in the checkpoint too.
    """

    def __init__(
        self,
        root: Path,
        minutes: float,
        found: Checkpoint | None = None,
        *,
        facts: dict[str, Any] | None = None,
        run: Callable[[], dict[str, Any]] = dict,
        force: bool = False,
        on_found: Callable[[list[StepReport]], None] | None = None,
        processes: Processes = ALONE,
        counters: Sequence[Counter] = (),
    ) -> None:
        self._root, self._minutes, self._found, self._facts = root, minutes, found, facts or {}
        self._run, self._counters = run, counters
        self._force, self._on_found, self._processes = force, on_found, processes
        self._last = time.monotonic()
        self._told: int | None = None  # the signal that came
        self._rows: RowSource | None = None

    def begin(self, runner: Runner, rows: RowSource) -> list[StepReport]:
        """Put runner and rows where the checkpoint was, if there is one; returns the reports of the steps done.

        Raises: OSError if the disk has no room for two checkpoints. ValueError, if the checkpoint is another run's.
        """
        if self._processes.first:
            prepare(self._root)
            shares = self._processes.count if runner.in_lockstep else 1
            check_space(self._root, (1 if self._found else 2) * shares * state_bytes(runner))
        self._last, self._rows = time.monotonic(), rows
        if self._found is None:
            return []
        found = self._found.facts()
        changed = [
            f"{key} was {found['facts'].get(key)}, now {v}"
            for key, v in self._facts.items()
            if key not in found["facts"] or found["facts"][key] != v
        ]
        if changed and not self._force:
            raise ValueError(
                f"{self._found.path} must be of this very run, but {'; '.join(changed)}: take the change back, or pass "
                "--force"
            )
        tensors = self._found.tensors()
        for counter in self._counters:
            counter.put_state(tensors)
        put_state(runner, tensors, found["numbers"], self._found.path)
        rows.go_on(len(found["reports"]), found.get("rows"), runner.recall)
        reports = [StepReport(**report) for report in found["reports"]]
        if self._on_found is not None:
            self._on_found(reports)
        return reports

    @property
    def told(self) -> int:
        """The number of the signal that came to this process, or 0."""
        return self._told or 0

    def after_step(self, runner: Runner, reports: list[StepReport], ended: bool = False) -> None:
        """Save if it is time; ended: the run has no further step.

        Raises: Stopped, if a signal came, to whichever process; NonFiniteLoss, if what is learned is not finite.
        """
        done = ended or reports[-1].step == reports[-1].steps
        told = self._processes.largest(self.told)
        due = time.monotonic() - self._last >= 60 * self._minutes
        where = self._root
        writers = ALONE
        if runner.in_lockstep:  # all write together, when the first one says so
            writers, due = self._processes, bool(self._processes.largest(int(due and self._processes.first)))
        if (self._processes.first or runner.in_lockstep) and (due or done or told):
            runner.check_learned()
            tensors, numbers = take_state(runner)
            for counter in self._counters:
                tensors |= counter.take_state()
            facts: dict[str, Any] = {
                "numbers": numbers,
                "reports": [asdict(report) for report in reports],
                "facts": self._facts,
            }
            facts["run"] = self._run()
            facts["rows"] = None if self._rows is None else self._rows.state()
            where = write_checkpoint(self._root, reports[-1].step, tensors, facts, processes=writers).path
            self._last = time.monotonic()
        if told:
            self._processes.wait()  # torchrun ends all as soon as one has left, and the first may be writing
            raise Stopped(told, reports[-1].step, reports[-1].steps, where)

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """The first SIGTERM or SIGINT waits for after_step; the second acts as before."""
        before = {number: signal.getsignal(number) for number in _SIGNALS}

        def hear(number: int, frame: FrameType | None) -> None:
            self._told = number
            for known, handler in before.items():
                signal.signal(known, handler)

        for number in _SIGNALS:
            signal.signal(number, hear)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
