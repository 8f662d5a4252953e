"""Progress that is always visible: bars on a terminal, elsewhere a line at most every ten seconds."""

import contextlib
import time
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

SECONDS_BETWEEN_LINES = 10.0


class Phase:
    """What one phase has done; advance() shows it."""

    def __init__(self, name: str, total: int) -> None:
        self.name, self.total = name, total
        self.done, self.tokens, self.resumed = 0, 0, 0
        self.loss: float | None = None
        self.begin = time.perf_counter()

    def advance(self, done: int = 1, *, tokens: int = 0, loss: float | None = None, resumed: bool = False) -> None:
        """done of total are ready, with so many tokens; loss is the latest. resumed: they were before this began."""
        self.done += done
        self.resumed += done if resumed else 0
        self.tokens += tokens
        self.loss = loss
        self.show()

    def show(self) -> None:
        """Nothing, unless a subclass shows it."""

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.begin

    @property
    def figures(self) -> str:
        """Loss and speed, as far as they are known."""
        loss = "" if self.loss is None else f"loss {self.loss:.3f}  "
        return f"{loss}{self.tokens / max(self.seconds, 1e-9):.0f} tokens/s" if self.tokens else loss.strip()


class Progress:
    """Shows phases one after another on console; None is standard output."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console()

    @contextlib.contextmanager
    def phase(self, name: str, total: int) -> Iterator[Phase]:
        """Yield the phase whose advance() moves the bar."""
        if not self.console.is_terminal:
            phase = _Lines(name, total, self.console)
            yield phase
            phase.print()
            return
        columns = (
            TextColumn("{task.description:<32}"),
            BarColumn(20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]:<26}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Bars(*columns, console=self.console) as bars:
            yield _Bar(name, total, bars)


class _Bar(Phase):
    def __init__(self, name: str, total: int, bars: Bars) -> None:
        super().__init__(name, total)
        self.bars, self.task = bars, bars.add_task(name, total=total, figures="")

    def show(self) -> None:
        if self.done == self.resumed:
            self.bars.reset(self.task, completed=self.done)  # else they count as if done in no time
        self.bars.update(self.task, completed=self.done, figures=self.figures)


class _Lines(Phase):
    def __init__(self, name: str, total: int, console: Console) -> None:
        super().__init__(name, total)
        self.console, self.printed = console, self.begin

    def show(self) -> None:
        if time.perf_counter() - self.printed > SECONDS_BETWEEN_LINES and self.done < self.total:
            self.print()

    def print(self) -> None:
        self.printed = time.perf_counter()
        own = self.done - self.resumed
        left = self.seconds / own * (self.total - self.done) if own else 0
        eta = f", about {left:.0f} s left" if self.done < self.total else ""
        self.console.print(
            f"{self.name}: {self.done}/{self.total}  {self.figures}  ({self.seconds:.0f} s{eta})",
            highlight=False,
            soft_wrap=True,
        )
