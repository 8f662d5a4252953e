"""Show progress: a bar on a terminal of any width; elsewhere a line, at most one every ten seconds."""

import contextlib
import time
from collections.abc import Iterator

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

SECONDS_BETWEEN_LINES = 10.0
_WIDEST_BAR, _SHORTEST_BAR = 20, 5
# Wide enough for "before, validation" and "3 min 20 s left", so that the bars of all phases align and do not move.
_NAME, _TIME = 18, 15


class Phase:
    """The progress of one phase. advance() updates it and shows it. console: where, if it is shown."""

    def __init__(self, name: str, total: int, console: Console | None = None) -> None:
        self.name, self.total, self.console = name, total, console
        self.done, self.tokens, self.resumed = 0, 0, 0
        self.loss: float | None = None
        self.dropped: float | None = None  # share of the masked weights
        self.begin = time.perf_counter()
        self.over = False  # set if it ends before all is done
        self.inside: Phase | None = None  # the phase that runs while this one waits
        self._paused = 0.0  # seconds of such phases so far

    def advance(
        self,
        done: int = 1,
        *,
        tokens: int = 0,
        loss: float | None = None,
        dropped: float | None = None,
        resumed: bool = False,
    ) -> None:
        """Add done steps and their tokens. loss, dropped: latest values. resumed: done before this phase began."""
        self.done += done
        self.resumed += done if resumed else 0
        self.tokens += tokens
        self.loss = loss
        self.dropped = self.dropped if dropped is None else dropped
        self.show()

    def show(self) -> None:
        """Show the progress. This class shows nothing; subclasses do."""

    @contextlib.contextmanager
    def inner_phase(self, name: str, total: int) -> Iterator["Phase"]:
        """Yield another phase that runs while this one waits. It is shown below; its time does not lower this speed."""
        self.inside = type(self)(name, total, self.console)
        try:
            yield self.inside
        finally:
            self._paused += self.inside.seconds
            self.inside = None

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.begin

    @property
    def left(self) -> float | None:
        """Seconds until all is done, at the pace so far; None before the first step is done."""
        own = self.done - self.resumed
        return self.seconds / own * (self.total - self.done) if own else None

    @property
    def figures(self) -> list[str]:
        """Loss, dropped share and speed, as far as they are known."""
        found = [] if self.loss is None else [f"loss {self.loss:.3f}"]
        found += [] if self.dropped is None else [f"{100 * self.dropped:.3g} % dropped"]
        speed = self.tokens / max(self.seconds - self._paused, 1e-9)
        return [*found, f"{speed:.0f} tokens/s"] if self.tokens else found


class Progress:
    """Shows phases one after another on console."""

    def __init__(self, console: Console) -> None:
        self.console = console

    @contextlib.contextmanager
    def phase(self, name: str, total: int) -> Iterator[Phase]:
        """Yield the phase whose advance() moves the bar."""
        if not self.console.is_terminal or self.console.is_dumb_terminal:
            phase = _Lines(name, total, self.console)
            yield phase
            phase.print()
            return
        bar = _Bar(name, total)
        with Live(bar, console=self.console):
            yield bar
            bar.stop()


def duration(seconds: float) -> str:
    """Return a short text such as "42 s", "3 min 20 s", "14 min", "2 h 05 min", "14 h" or "3 d 4 h"."""
    whole = round(seconds)
    minutes, hours = whole // 60, whole // 3600
    if whole < 60:
        return f"{whole} s"
    if minutes < 60:
        return f"{minutes} min {whole % 60:02} s" if minutes < 10 else f"{minutes} min"
    if hours < 48:
        return f"{hours} h {minutes % 60:02} min" if hours < 10 else f"{hours} h"
    return f"{hours // 24} d {hours % 24} h"


class _Bar(Phase):
    """One line that fits any terminal width, and is redrawn while it is live."""

    _took: float | None = None

    def stop(self) -> None:
        self._took = self.seconds

    @property
    def seconds(self) -> float:
        return super().seconds if self._took is None else self._took

    def parts(self, width: int) -> tuple[str, int, str]:
        """Return (name, cells of the bar, the rest). A narrow terminal loses the bar first, then the last figures."""
        count, figures = f"{self.done:>{len(str(self.total))}}/{self.total}", self.figures
        for known in range(len(figures), -1, -1):
            rest = "  ".join([count, *figures[:known], f"{self._time:<{_TIME}}"])
            if _NAME + 2 + len(rest) <= width:
                break
        room = max(0, width - len(rest) - 2)
        name = self.name.ljust(_NAME) if len(self.name) <= room else f"{self.name[: max(0, room - 3)]}..."
        bar = min(_WIDEST_BAR, room - len(name) - 2)
        return name[:room], bar if bar >= _SHORTEST_BAR else 0, rest

    @property
    def _time(self) -> str:
        if self.done >= self.total or self.over:
            return f"in {duration(self.seconds)}"
        return "" if self.left is None else f"{duration(self.left)} left"

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        name, bar, rest = self.parts(options.max_width)
        if bar:
            line = Table.grid(padding=0)
            line.add_row(Text(f"{name}  "), ProgressBar(self.total, self.done, width=bar), Text(f"  {rest}"))
            yield line
        else:
            yield Text(f"{name}  {rest}", no_wrap=True, overflow="crop")
        if isinstance(inside := self.inside, _Bar):
            yield inside


class _Lines(Phase):
    _printed: float | None = None

    def show(self) -> None:
        if time.perf_counter() - (self._printed or self.begin) > SECONDS_BETWEEN_LINES and self.done < self.total:
            self.print()

    def print(self) -> None:
        self._printed = time.perf_counter()
        left = self.left
        ahead = "" if left is None or self.done >= self.total or self.over else f", about {duration(left)} left"
        line = "  ".join([f"{self.done}/{self.total}", *self.figures, f"({duration(self.seconds)}{ahead})"])
        assert self.console is not None, "lines are printed there"
        self.console.print(f"{self.name}: {line}", highlight=False, soft_wrap=True, markup=False)
