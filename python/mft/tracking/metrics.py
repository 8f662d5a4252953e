"""Send a run's events, training steps and evaluations, to the metrics file, the progress display and the trackers."""

import contextlib
import dataclasses
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from torch import nn

from mft.config import TrainConfig
from mft.data.streams import StreamedRows, count_rows
from mft.engines.placed import Placed
from mft.engines.step import StepReport
from mft.evaluation.evaluate import Evaluation, evaluate
from mft.files.atomic import convert_disk_errors, write_whole
from mft.files.json_file import parse_value
from mft.objectives.cross_entropy import CROSS_ENTROPY
from mft.objectives.objective import Objective
from mft.tracking.curves import PLOT, Curves, plot_curves
from mft.tracking.progress import Phase, Progress
from mft.tracking.trackers import Trackers

METRICS = "metrics.jsonl"  # in the directory of a run
EVALUATION_BATCH = 4
REDRAW = 30.0  # seconds between two drawings of the plot during training


class Recorder:
    """Records the phases of a run. Without a directory nothing is written; without a progress nothing is shown.

    events: as for MetricsFile. trackers: receive every event that is written. plot: whether the plot is drawn during
    training. objective: the name of the objective that training minimises.
    """

    def __init__(
        self,
        directory: Path | None = None,
        progress: Progress | None = None,
        *,
        events: list[dict[str, Any]] | None = None,
        trackers: Trackers | None = None,
        plot: bool = False,
        objective: str = CROSS_ENTROPY.name,
    ) -> None:
        self.metrics = None if directory is None else MetricsFile(directory / METRICS, events)
        self.progress, self.trackers, self._objective = progress, trackers, objective
        self.curves: Curves = {}
        # {step: loss}, with the objective's own loss if the event has one.
        evaluated = [event for event in events or () if "accuracy" in event and "step" in event]
        losses = [[loss for key, loss in event.items() if key.endswith("/loss")] for event in evaluated]
        self.validation = {event["step"]: (own or [event["loss"]])[0] for event, own in zip(evaluated, losses)}
        self.documents: int | None = evaluated[-1].get("documents") if evaluated else None  # of validation
        self._plot = directory / PLOT if directory is not None and plot else None
        self._drawn, self._drawing = time.monotonic(), 0.0  # time of the last drawing, and the seconds that it took

    def write(self, **values) -> None:
        if self.metrics is not None:
            self.metrics.write(**values)
        if self.trackers is not None:
            self.trackers.tell(values)

    @contextlib.contextmanager
    def training(
        self, phase: str, dataset, train: TrainConfig, *, after_step: Callable[[], None] = lambda: None
    ) -> Iterator["Steps"]:
        """Yield the on_step of a training loop. It writes every train.log_every-th step and the last one.

        after_step is called after a step has been written and shown. A stream's description is printed at the end.
        """
        with self._show_progress(phase, train.steps_for(count_rows(dataset))) as shown:
            steps = Steps(self, phase, train.log_every, shown, after_step)
            yield steps
            steps.finish()
        if isinstance(dataset, StreamedRows) and self.progress is not None:
            for line in dataset.describe():
                self.progress.console.print(line, style="dim", highlight=False, soft_wrap=True)

    def evaluate(
        self,
        phase: str,
        model: nn.Module | Placed,
        dataset,
        *,
        step: int | None = None,
        batch_size: int = EVALUATION_BATCH,
        objective: Objective = CROSS_ENTROPY,
        **options,
    ) -> Evaluation:
        """Do evaluate(**options) with progress, and write the result. step: of the run, for validation data."""
        with self._show_progress(phase, len(dataset)) as shown:
            result = evaluate(
                model,
                dataset,
                batch_size=batch_size,
                objective=objective,
                on_batch=lambda rows, tokens: shown.advance(rows, tokens=tokens),
                **options,
            )
        self.write_evaluation(phase, result, step, objective)
        return result

    def write_evaluation(
        self, phase: str, result: Evaluation, step: int | None, objective: Objective = CROSS_ENTROPY, **more: Any
    ) -> None:
        """Write an evaluation. The figures that the objective measures are named NAME/figure, with its name."""
        at = {} if step is None else {"step": step}
        if step is not None:
            self.validation.setdefault(step, result.objective_loss)
            self.documents = len(result.documents)
        self.write(
            phase=phase,
            **at,
            loss=result.loss,
            accuracy=result.accuracy,
            tokens=int(result.tokens.sum()),
            documents=len(result.documents),
            **{f"{objective.name}/{name}": figure for name, figure in result.figures.items()},
            **more,
        )

    @contextlib.contextmanager
    def _show_progress(self, name: str, total: int) -> Iterator[Phase]:
        """Yield the phase whose advance() is called after each of total steps; see progress.py."""
        if self.progress is None:
            yield Phase(name, total)
            return
        with self.progress.phase(name, total) as phase:
            yield phase

    def redraw(self) -> None:
        """Draw the plot again if the last drawing is old enough: drawing takes at most a hundredth of the time."""
        if self._plot is None or time.monotonic() - self._drawn < max(REDRAW, 99 * self._drawing):
            return
        begin = time.monotonic()
        self.draw(self._plot)
        self._drawn = time.monotonic()
        self._drawing = self._drawn - begin

    def draw(self, path: Path, **options: Any) -> None:
        """Draw the plot of everything recorded so far. options: further arguments of plot_curves."""
        told: dict[str, Any] = {"objective": self._objective, "documents": self.documents} | options
        plot_curves(self.curves, path, self.validation, **told)


def read_recorder(path: Path) -> Recorder:
    """Return a recorder with what a metrics file says of a cross-entropy run, to draw it. Raises: as read_metrics."""
    events = read_metrics(path)
    recorder, names = Recorder(events=events), {field.name for field in dataclasses.fields(StepReport)}
    for event in events:
        if "steps" in event:  # a step, as Steps writes it
            report = StepReport(**{name: value for name, value in event.items() if name in names})
            recorder.curves.setdefault(event["phase"], []).append(report)
    return recorder


class Steps:
    """The on_step of a training loop: call it with each step's report."""

    def __init__(
        self, recorder: Recorder, phase: str, log_every: int, shown: Phase, after_step: Callable[[], None]
    ) -> None:
        self.shown, self._after_step = shown, after_step
        self._recorder, self._phase, self._log_every = recorder, phase, log_every
        self._curve = recorder.curves.setdefault(phase, [])

    def __call__(self, report: StepReport) -> None:
        self._curve.append(report)
        if self._is_written(report):
            self._write(report)
        self.shown.advance(1, tokens=report.tokens, loss=report.loss, dropped=report.dropped)
        self._recorder.redraw()
        self._after_step()

    def go_on(self, reports: list[StepReport]) -> None:
        """Add steps that were done and written before the run was stopped."""
        self._curve.extend(reports)
        self.shown.advance(len(reports), resumed=True)

    def finish(self) -> None:
        """End the phase, also if more steps were expected. The last step is written if it was not yet."""
        self.shown.over = True
        if self._curve and not self._is_written(self._curve[-1]):
            self._write(self._curve[-1])

    def _write(self, report: StepReport) -> None:
        known = {name: value for name, value in vars(report).items() if value is not None}
        self._recorder.write(phase=self._phase, **known)

    def _is_written(self, report: StepReport) -> bool:
        return report.step % self._log_every == 0 or report.step == report.steps


class MetricsFile:
    """A file with a line of JSON per event, on disk at once. events: with which a resumed run's file starts."""

    def __init__(self, path: str | os.PathLike, events: Iterable[dict[str, Any]] | None = None) -> None:
        self.path = Path(path)
        self.events = list(events or ())
        if events is not None:
            write_whole(self.path, "".join(map(_line, self.events)))

    def write(self, **values: Any) -> None:
        self.events.append(values)
        with convert_disk_errors(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(_line(values))

    def sync(self) -> None:
        """Sync the file, and return when the disk has it."""
        with convert_disk_errors(self.path), self.path.open("rb+") as file:
            os.fsync(file.fileno())


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the events of a run, without an incomplete last line.

    Raises: ValueError that names a line which is not an event.
    """
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    events = []
    for number, line in enumerate(lines, 1):
        try:
            event = parse_value(line.encode(), path)
        except ValueError:
            event = None
        if not isinstance(event, dict):
            raise ValueError(f"{path}:{number}: expected an event as mft writes it, a JSON object, got {line[:80]!r}")
        events.append(event)
    return events


def _line(event: dict[str, Any]) -> str:
    return json.dumps(event) + "\n"
