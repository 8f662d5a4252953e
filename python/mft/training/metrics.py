"""Where a run's events go: training steps and evaluations to the metrics file and to the progress display."""

import contextlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from torch import nn

from mft.config import TrainConfig
from mft.engines.step import StepReport
from mft.evaluation.evaluate import Evaluation, evaluate
from mft.files.atomic import naming, write_whole
from mft.objectives.cross_entropy import CROSS_ENTROPY
from mft.objectives.objective import Objective
from mft.training.progress import Progress
from mft.training.run_directory import METRICS

EVALUATION_BATCH = 4


class Recorder:
    """Records phases of a run. Without a directory nothing is written; without a progress nothing is shown.

    events: of MetricsFile.
    """

    def __init__(
        self,
        directory: Path | None = None,
        progress: Progress | None = None,
        *,
        events: list[dict[str, Any]] | None = None,
    ) -> None:
        self.metrics = None if directory is None else MetricsFile(directory / METRICS, events)
        self.progress = progress
        self.curves: dict[str, list[StepReport]] = {}

    def write(self, **values) -> None:
        if self.metrics is not None:
            self.metrics.write(**values)

    @contextlib.contextmanager
    def training(self, phase: str, dataset, train: TrainConfig) -> Iterator["Steps"]:
        """Yield the on_step of a training loop; every train.log_every-th step and the last are written."""
        with self.shown(phase, train.steps_for(len(dataset))) as advance:
            yield Steps(self, phase, train.log_every, advance)

    def evaluate(
        self,
        phase: str,
        model: nn.Module,
        dataset,
        *,
        batch_size: int = EVALUATION_BATCH,
        objective: Objective = CROSS_ENTROPY,
        **options,
    ) -> Evaluation:
        """evaluate(), shown and written; options are its own. What the objective measures is called NAME/figure."""
        with self.shown(phase, len(dataset)) as advance:
            result = evaluate(
                model,
                dataset,
                batch_size=batch_size,
                objective=objective,
                on_batch=lambda rows, tokens: advance(rows, tokens=tokens),
                **options,
            )
        self.write(
            phase=phase,
            loss=result.loss,
            accuracy=result.accuracy,
            tokens=int(result.tokens.sum()),
            documents=len(result.documents),
            **{f"{objective.name}/{name}": figure for name, figure in result.figures.items()},
        )
        return result

    @contextlib.contextmanager
    def shown(self, name: str, total: int) -> Iterator[Callable[..., None]]:
        """Yield what is called after each of total steps; see progress.py."""
        if self.progress is None:
            yield lambda *args, **kwargs: None
            return
        with self.progress.phase(name, total) as phase:
            yield phase.advance


class Steps:
    """Called with each step's report."""

    def __init__(self, recorder: Recorder, phase: str, log_every: int, advance: Callable[..., None]) -> None:
        self._recorder, self._phase, self._log_every, self._advance = recorder, phase, log_every, advance
        self._curve = recorder.curves.setdefault(phase, [])

    def __call__(self, report: StepReport) -> None:
        self._curve.append(report)
        if report.step % self._log_every == 0 or report.step == report.steps:
            self._recorder.write(phase=self._phase, **vars(report))
        self._advance(1, tokens=report.tokens, loss=report.loss)

    def go_on(self, reports: list[StepReport]) -> None:
        """These steps were done, and written, before the run was stopped."""
        self._curve.extend(reports)
        self._advance(len(reports), resumed=True)


class MetricsFile:
    """A line of JSON an event, on disk as soon as it is written.

    events: of a run that goes on, as they were at its checkpoint; the file then holds these and no others.
    """

    def __init__(self, path: str | os.PathLike, events: Iterable[dict[str, Any]] | None = None) -> None:
        self.path = Path(path)
        self.events = list(events or ())
        if events is not None:
            write_whole(self.path, "".join(map(_line, self.events)))

    def write(self, **values: Any) -> None:
        self.events.append(values)
        with naming(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(_line(values))

    def sync(self) -> None:
        """Return when the disk has it."""
        with naming(self.path), self.path.open("rb+") as file:
            os.fsync(file.fileno())


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The events of a run that may still be going on, or was killed: a last line that is not whole yet is left out.

    Raises: ValueError that names a line which is no event.
    """
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    events = []
    for number, line in enumerate(lines, 1):
        try:
            event = json.loads(line)
        except ValueError:
            event = None
        if not isinstance(event, dict):
            raise ValueError(f"{path}:{number}: expected an event as mft writes it, a JSON object, got {line[:80]!r}")
        events.append(event)
    return events


def _line(event: dict[str, Any]) -> str:
    return json.dumps(event) + "\n"
