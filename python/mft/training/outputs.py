"""What a run writes and prints besides its result and its checkpoints: metrics, trackers, table, plot, progress."""

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mft.config import TrainConfig
from mft.data.streams import count_rows
from mft.engines.distributed import ALONE
from mft.engines.placed import Placed
from mft.evaluation.evaluate import Evaluation, paired_difference
from mft.evaluation.table import evaluation_tables, figure_lines, source_losses
from mft.files.atomic import write_whole
from mft.files.json_file import finite
from mft.tracking.console import console, say
from mft.tracking.curves import PLOT
from mft.tracking.markdown_table import markdown_table
from mft.tracking.metrics import EVALUATION_BATCH, Recorder, Steps
from mft.tracking.progress import Progress
from mft.tracking.trackers import Trackers
from mft.training.best import Best
from mft.training.core_watch import CoreWatch
from mft.training.resume import Begin, Run, flat
from mft.training.run_directory import TABLE_JSON, TABLE_MARKDOWN
from mft.training.validation import Ended, Standing, Validation, validation_message

VALIDATION = "validation"  # the name of the phase in the metrics


class Outputs:
    """The outputs of a run. Of several processes only the first one opens them; the others have an empty recorder."""

    def __init__(self, run: Run, recorder: Recorder) -> None:
        self.run, self.recorder = run, recorder
        self._cores = CoreWatch(run.processes)

    @classmethod
    @contextlib.contextmanager
    def open(cls, run: Run) -> Iterator["Outputs"]:
        """Open metrics and trackers, restored to the run's checkpoint, until the block ends."""
        config, events = run.config, run.found.run()["events"] if run.found is not None else []
        told = None if isinstance(run.start, Begin) else events
        trackers = Trackers(config.report_to, run.directory, config.project, flat(config), told, say)
        try:
            more: dict[str, Any] = {"trackers": trackers, "plot": True, "objective": config.objective.name}
            yield cls(run, Recorder(run.directory, Progress(console), events=events, **more))
        finally:
            trackers.close()

    @property
    def events(self) -> list[dict[str, Any]]:
        """The events that were written so far."""
        return [] if self.recorder.metrics is None else self.recorder.metrics.events

    def evaluate_start(self, phase: str, placed: Placed, rows: Any) -> Evaluation | None:
        """Evaluate before the first step, if there are rows. A resumed run does not record the result again."""
        if not len(rows):
            return None
        recorder = self.recorder if self.run.found is None else Recorder(progress=self.recorder.progress)
        self._cores.begin()
        before = self._evaluate(recorder, phase, placed, rows, 0)
        self._cores.look("evaluation")
        return before

    def evaluate_end(self, placed: Placed, rows: Any, step: int) -> Evaluation | None:
        """Evaluate the exported step, if there are rows."""
        return self._evaluate(self.recorder, "after, validation", placed, rows, step) if len(rows) else None

    def _evaluate(self, recorder: Recorder, phase: str, placed: Placed, rows: Any, step: int) -> Evaluation:
        options: dict[str, Any] = {"step": step, "objective": placed.objective}
        options["batch_size"] = evaluation_batch(placed, self.run.config.train)
        return recorder.evaluate(phase, dataclasses.replace(placed, processes=ALONE), rows, **options)

    @contextlib.contextmanager
    def training(self, phase: str, rows: Any) -> Iterator[Steps]:
        """Enter recorder.training, after a line about the amount of data. Warns if busy cores slow the run down."""
        train = self.run.config.train
        if self.run.processes.first:
            say(training_summary(train, rows))
        self._cores.begin()
        with self.recorder.training(phase, rows, train, after_step=lambda: self._cores.look("a step")) as on_step:
            yield on_step

    def validation(self, on_step: Steps, placed: Placed, rows: Any, best: Best | None) -> Validation | None:
        """Return what evaluates the run on rows while it trains; None if the configuration asks for no evaluation."""
        train = self.run.config.train
        if not train.evaluates:
            return None

        @contextlib.contextmanager
        def shown(step: int) -> Iterator[Callable[[int, int], None]]:
            with on_step.shown.inner_phase(f"step {step}, {VALIDATION}", len(rows)) as phase:
                yield lambda done, tokens: phase.advance(done, tokens=tokens)

        def on_result(step: int, result: Evaluation, seconds: float, standing: Standing) -> None:
            stands = {"best": standing.best, "without": standing.without, "seconds": seconds}
            self.recorder.write_evaluation(VALIDATION, result, step, placed.objective, **stands)
            if self.run.processes.first:
                say(f"{VALIDATION} after step {step}: {validation_message(result, step, standing, train)}")

        options: dict[str, Any] = {"objective": placed.objective, "batch_size": evaluation_batch(placed, train)}
        return Validation(rows, best=best, shown=shown, on_result=on_result, **options)

    @contextlib.contextmanager
    def finishing(self, before: Evaluation | None, after: Evaluation | None, ended: Ended, name: str) -> Iterator[Path]:
        """Write table, plot and metrics; then the block writes the result under this name, which finishes the run."""
        directory = self.run.directory
        if before is not None and after is not None:
            self._write_table(before, after, ended)
        best = ended.exported if ended.exported < ended.last else None
        self.recorder.draw(directory / PLOT, best=best, note=ended.note)
        if self.recorder.metrics is not None:
            self.recorder.metrics.sync()
        yield directory / name
        table = "" if before is None else ", table"
        say(f"result: {directory / name}; metrics{table} and plot: {directory}/")

    def _write_table(self, before: Evaluation, after: Evaluation, ended: Ended) -> None:
        directory, results = self.run.directory, {"before": before, f"after{ended.words}": after}
        tables = evaluation_tables("validation", results)
        for table in tables:
            console.print(table)
        write_whole(directory / TABLE_MARKDOWN, "\n".join(map(markdown_table, tables)))
        objective = self.run.config.objective.name
        for line in figure_lines(objective, results):
            say(line)
        difference, error = paired_difference(after, before)
        numbers: dict[str, Any] = {
            name: {"loss": result.loss, "accuracy": result.accuracy}
            | {f"{objective}/{key}": figure for key, figure in result.figures.items()}
            for name, result in (("before", before), ("after", after))
        }
        numbers |= {"loss after - before": difference, "standard error": error}
        numbers |= {"documents": len(after.documents), "tokens": int(after.tokens.sum())} | ended.numbers
        if parts := source_losses({"before": before, "after": after}):
            numbers["sources"] = parts
        write_whole(directory / TABLE_JSON, json.dumps(finite(numbers), indent=2) + "\n")


def evaluation_batch(placed: Placed, train: TrainConfig) -> int:
    """Return the rows per batch of evaluations: train.batch_size if the device holds only a part of the model."""
    return EVALUATION_BATCH if placed.mode.reading_mode(placed).is_whole_on_device else train.batch_size


def training_summary(train: TrainConfig, rows: Any) -> str:
    """Return the line with the amount of data and the units of the figures shown while training."""
    count = count_rows(rows)
    steps, taken = train.steps_for(count), train.batch_size * train.accumulation
    seen = "" if count is None else f", so each of {count} rows about {steps * taken / count:.2g} times"
    return f"{steps} steps of {taken} rows{seen}; loss is in nats per token, tokens/s count padding too"
