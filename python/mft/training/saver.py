"""Write the checkpoints of a training run: at a fixed interval, after the last step, and when a signal stops it.

After SIGTERM, Ctrl-C (SIGINT) or the end of its terminal (SIGHUP) the run finishes the step, saves, and exits with code
128 + the signal's number: 143, 130 or 129. After a second SIGTERM or Ctrl-C it exits at once, and the last checkpoint
remains. Under nohup the end of the terminal changes nothing.
"""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from torch import Tensor

from mft.engines.distributed import ALONE, Processes
from mft.engines.step import Runner, StepReport
from mft.training.checkpoint import Checkpoint, check_space, prepare, write_checkpoint
from mft.training.row_source import RowSource
from mft.training.state import put_state, state_bytes, take_state

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Stopped(SystemExit):
    """Training was stopped by a signal and has saved a checkpoint."""

    def __init__(self, number: int, step: int, steps: int, where: Path) -> None:
        super().__init__(128 + number)
        self.message = f"stopped by {signal.Signals(number).name} after step {step} of {steps}; saved: {where}"


class Counter(Protocol):
    """An object that is updated in each step before the saver is called, and whose state is saved in checkpoints."""

    def take_state(self) -> dict[str, Tensor]: ...

    def put_state(self, tensors: Mapping[str, Tensor]) -> None: ...


@dataclass(frozen=True)
class Saved:
    """What a run adds to each of its checkpoints.

    facts: must equal those of the resumed checkpoint unless force. run: returns further values (Checkpoint.run).
    on_found: called with the reports of the steps before the resumed checkpoint.
    """

    facts: dict[str, Any] = field(default_factory=dict)
    force: bool = False
    run: Callable[[], dict[str, Any]] = dict
    on_found: Callable[[list[StepReport]], None] | None = None


class Saver:
    """Writes checkpoints; train_loop calls it after each step.

    Args: root: their directory; minutes: between two of them, 0 for every step; found: the one to resume from;
        processes: the first one writes, and each its rows of spread tensors; counters: objects whose tensors are saved
        and restored.
    """

    def __init__(
        self,
        root: Path,
        minutes: float,
        found: Checkpoint | None = None,
        *,
        saved: Saved = Saved(),
        processes: Processes = ALONE,
        counters: Sequence[Counter] = (),
    ) -> None:
        self._root, self._minutes, self._found, self._saved = root, minutes, found, saved
        self._counters, self._processes = counters, processes
        self._last = time.monotonic()
        self.told = 0  # the number of the signal that this process has received
        self._rows: RowSource | None = None

    def begin(self, runner: Runner, rows: RowSource) -> list[StepReport]:
        """Restore runner and rows from the checkpoint, if there is one; return the reports of the steps before it.

        Raises: OSError if the disk has no room for two checkpoints; ValueError if the checkpoint is another run's.
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
            for key, v in self._saved.facts.items()
            if key not in found["facts"] or found["facts"][key] != v
        ]
        if changed and not self._saved.force:
            raise ValueError(
                f"{self._found.path} must be of this very run, but {'; '.join(changed)}: undo the change, or pass "
                "--force"
            )
        tensors = self._found.tensors()
        for counter in self._counters:
            counter.put_state(tensors)
        put_state(runner, tensors, found["numbers"], self._found.path)
        rows.go_on(len(found["reports"]), found.get("rows"), runner.recall)
        reports = [StepReport(**report) for report in found["reports"]]
        if self._saved.on_found is not None:
            self._saved.on_found(reports)
        return reports

    def after_step(self, runner: Runner, reports: list[StepReport], ended: bool = False) -> None:
        """Save if it is time, or if the run has ended.

        Raises: Stopped if any process received a signal; NonFiniteLoss if a trained tensor is not finite.
        """
        done = ended or reports[-1].step == reports[-1].steps
        told = self._processes.largest(self.told)
        due = time.monotonic() - self._last >= 60 * self._minutes
        where = self._root
        writers = ALONE
        if runner.in_lockstep:  # all processes write together; the first one decides when
            writers, due = self._processes, bool(self._processes.largest(int(due and self._processes.first)))
        if (self._processes.first or runner.in_lockstep) and (due or done or told):
            runner.states.check_learned()
            tensors, numbers = take_state(runner)
            for counter in self._counters:
                tensors |= counter.take_state()
            facts: dict[str, Any] = {
                "numbers": numbers,
                "reports": [asdict(report) for report in reports],
                "facts": self._saved.facts,
            }
            facts["run"] = self._saved.run()
            facts["rows"] = None if self._rows is None else self._rows.state()
            where = write_checkpoint(self._root, reports[-1].step, tensors, facts, processes=writers).path
            self._last = time.monotonic()
        if told:
            self._processes.wait()  # torchrun ends all processes once one has left; the first may still be writing
            raise Stopped(told, reports[-1].step, reports[-1].steps, where)

    @contextlib.contextmanager
    def handle_signals(self) -> Iterator[None]:
        """Handle the first signal in after_step; a second SIGTERM or SIGINT acts as it did before this context."""
        before = {number: signal.getsignal(number) for number in _SIGNALS}
        if before[signal.SIGHUP] is signal.SIG_IGN:  # nohup
            del before[signal.SIGHUP]
        terminals = [number for number in (1, 2) if os.isatty(number)]

        def hear(number: int, frame: FrameType | None) -> None:
            self.told = number
            for known, handler in before.items():  # the kernel and the shell each send a SIGHUP
                signal.signal(known, signal.SIG_IGN if known == signal.SIGHUP else handler)
            for output in terminals:
                if not os.isatty(output):  # the terminal is gone: each write would raise OSError
                    null = os.open(os.devnull, os.O_WRONLY)
                    os.dup2(null, output)
                    os.close(null)

        for number in before:
            signal.signal(number, hear)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
