"""Where a run's events go: training steps and evaluations to the metrics file and to the progress display."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import nn

from mft.config import TrainConfig
from mft.engines.step import StepReport
from mft.evaluation.evaluate import Evaluation, evaluate
from mft.training.loop import count_steps
from mft.training.progress import Progress
from mft.training.run_directory import METRICS, MetricsFile

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
        with self.shown(phase, count_steps(train, len(dataset))) as advance:
            yield Steps(self, phase, train.log_every, advance)

    def evaluate(
        self, phase: str, model: nn.Module, dataset, *, batch_size: int = EVALUATION_BATCH, **options
    ) -> Evaluation:
        """evaluate(), shown and written; options are its own."""
        with self.shown(phase, len(dataset)) as advance:
            result = evaluate(
                model,
                dataset,
                batch_size=batch_size,
                on_batch=lambda rows, tokens: advance(rows, tokens=tokens),
                **options,
            )
        self.write(
            phase=phase,
            loss=result.loss,
            accuracy=result.accuracy,
            tokens=int(result.tokens.sum()),
            documents=len(result.documents),
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
