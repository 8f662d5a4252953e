"""The checkpoints of a run and its best step, until the run has its result."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from mft.config_file import config_values
from mft.engines.sharded.score_rows import score_rows
from mft.engines.step import StepReport
from mft.files.atomic import remove
from mft.tracking.console import say
from mft.training.best import Best
from mft.training.resume import Run
from mft.training.run_directory import BEST, CHECKPOINTS
from mft.training.saver import Counter, Saved, Saver
from mft.training.validation import Ended, Validation, stop_message


class RunCheckpoints:
    """Where a run is resumed from, and which step it exports."""

    def __init__(self, run: Run) -> None:
        self._run = run

    def saver(
        self,
        events: list[dict[str, Any]],
        facts: dict[str, Any],
        on_found: Callable[[list[StepReport]], None],
        counters: Sequence[Counter | None],
    ) -> Saver | None:
        """Return what writes and reads the run's checkpoints; None if neither is needed. Args: see Saver."""
        run, minutes = self._run, self._run.config.checkpoint_minutes
        if minutes is None and run.found is None:
            return None
        return Saver(
            run.directory / CHECKPOINTS,
            math.inf if minutes is None else minutes,
            run.found,
            saved=Saved(
                facts,
                force=run.start.force,
                run=lambda: {"config": config_values(run.config), "events": events},
                on_found=on_found,
            ),
            counters=[counter for counter in counters if counter is not None],
            processes=run.processes,
        )

    def best(self) -> Best | None:
        """Return where the best step is stored; None if the last one is exported."""
        return Best(self._run.directory / BEST) if self._run.config.train.keep_best else None

    def finish(self, model: nn.Module, last: StepReport, validation: Validation | None) -> Ended:
        """Return how the run ended, and print it. Puts the exported step (the best or the last) into the model."""
        if validation is None:
            return Ended(last.step, last.step, last.steps)
        standing, train = validation.standing, self._run.config.train
        if standing.stopped and last.step < last.steps:
            say(stop_message(standing, last, train))
        best = self.best()
        if best is None:
            return Ended(last.step, last.step, last.steps)
        if standing.best != last.step and (self._run.processes.first or score_rows(model) is not None):
            best.put(model, standing.best)
        say(f"the best step is {standing.best} of {last.step}, with a validation loss of {standing.best_loss:.4f}")
        return Ended(standing.best, last.step, last.steps)

    def delete(self) -> None:
        """Delete checkpoints and best step, once the run has its result."""
        for name in (CHECKPOINTS, BEST):
            if (self._run.directory / name).exists():
                remove(self._run.directory / name)
