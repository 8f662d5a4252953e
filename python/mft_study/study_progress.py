"""A study's progress: a line for each finished unit, and on a terminal a bar below the lines."""

import contextlib
import time
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.table import Column

from mft.tracking.progress import SECONDS_BETWEEN_LINES, duration
from mft.training.loop import StepReport


class Shown:
    """Counts units. The rate is that of units which this process saw; the time left is estimated from their work."""

    def __init__(self, console: Console, bars: Progress | None) -> None:
        self._console, self._bars = console, bars
        self._task: TaskID | None = None if bars is None else bars.add_task("units", total=None, rest="")
        self._done, self._finished, self._worked = 0, 0, 0.0
        self._left, self._work_left = 0, 0.0
        self._begin = self._printed = time.perf_counter()

    def count_kept(self, units: int) -> None:
        """Count units that an earlier command, or another process, has done."""
        self._done += units

    def set_left(self, units: int, work: float) -> None:
        """Set how many units, and how much work, are left as far as known."""
        self._left, self._work_left = units, work

    def count_finished(self, words: str, seconds: float, work: float) -> None:
        """Count a finished unit and its work, and print its line."""
        self._done += 1
        self._finished += 1
        self._worked += work
        known = self._done + self._left
        spent = time.perf_counter() - self._begin
        left = spent / self._worked * self._work_left
        rest = f"{3600 * self._finished / spent:.0f} an hour, about {duration(left)} left"
        line = f"{words}, {duration(seconds)}"
        if self._bars is None:
            line = f"[{self._done}/{known}] {line} ({rest})"
        self._console.print(line, highlight=False, soft_wrap=True, markup=False)
        if self._bars is not None and self._task is not None:
            self._bars.update(self._task, completed=self._done, total=known, rest=rest)

    def step(self, report: StepReport) -> None:
        """Show a training step of the model from scratch."""
        left = report.seconds / report.step * (report.steps - report.step)
        rest = f"loss {report.loss:.3f}, about {duration(left)} left"
        if self._bars is not None and self._task is not None:
            self._bars.update(
                self._task, completed=report.step, total=report.steps, rest=rest, description="base from scratch"
            )
        elif time.perf_counter() - self._printed > SECONDS_BETWEEN_LINES or report.step == report.steps:
            self._printed = time.perf_counter()
            self._console.print(
                f"base from scratch: step {report.step}/{report.steps}, {rest}", highlight=False, soft_wrap=True
            )


@contextlib.contextmanager
def show_progress(console: Console) -> Iterator[Shown]:
    """Show progress on console, with a bar if it is a terminal."""
    if not console.is_terminal:
        yield Shown(console, None)
        return
    count = MofNCompleteColumn(table_column=Column(no_wrap=True))  # a narrow terminal would cut it otherwise
    columns = (TextColumn("{task.description}"), BarColumn(20), count, TextColumn("{task.fields[rest]}"))
    with Progress(*columns, console=console) as bars:
        yield Shown(console, bars)
