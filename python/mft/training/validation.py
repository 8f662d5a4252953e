"""Evaluate on validation data while a run trains, to find the best step and to stop early.

    step   loss     best      patience 2, min_delta 0.01
      10   2.500    10        the next loss must be more than 0.01 below 2.500
      20   2.495    20        1 evaluation without such a loss (but the best step so far)
      30   2.480    30        the next loss must be more than 0.01 below 2.480
      40   2.481    30        1 evaluation without such a loss
      50   2.475    50        2 evaluations without such a loss: the run ends

The evaluation does not change what is learned: the training runner evaluates, and the random states are restored.
"""

import math
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mft.config import TrainConfig
from mft.engines.distributed import Processes
from mft.engines.placed import Placed
from mft.engines.randomness import put_random_states, take_random_states
from mft.engines.step import NonFiniteLoss, StepReport
from mft.evaluation.evaluate import Evaluation, evaluate
from mft.objectives.cross_entropy import CROSS_ENTROPY
from mft.objectives.objective import Objective
from mft.training.best import Best

_STATE = "validation.state"  # the tensor's name in a checkpoint: the fields of Standing, fp64

OnBatch = Callable[[int, int], None]
Shown = Callable[[int], AbstractContextManager[OnBatch]]


@dataclass
class Standing:
    """The state of a run's evaluations. Losses are in nats per token; steps count from 1, and 0 means none."""

    evaluated: int = 0  # the step of the latest evaluation
    best: int = 0  # the step of the smallest loss, the earlier one of equals
    best_loss: float = math.inf
    to_undercut: float = math.inf  # the next loss must be lower by more than min_delta
    without: int = 0  # evaluations since then without such a loss
    stopped: bool = False


class _Interrupted(Exception):
    """A signal came: the evaluation is aborted, and repeated when the run is resumed."""


class Validation:
    """Evaluates after a step if train.eval_every or train.eval_minutes says so. Its state is saved in checkpoints.

    Args: dataset: held-out rows; best: where the best step is stored (the first process writes it); shown: shown(step)
        is a context around the evaluation, which yields a callback for each batch; on_result: called with the step, the
        evaluation, its seconds, and the standing after it.
    """

    def __init__(
        self,
        dataset,
        *,
        objective: Objective = CROSS_ENTROPY,
        best: Best | None = None,
        batch_size: int = 4,
        shown: Shown = lambda step: nullcontext(lambda rows, tokens: None),
        on_result: Callable[[int, Evaluation, float, Standing], None] | None = None,
    ) -> None:
        self.standing = Standing()
        self._dataset, self._objective = dataset, objective
        self._best, self._batch_size = best, batch_size
        self._shown, self._on_result = shown, on_result
        self._last = time.monotonic()

    def begin(self, told: Callable[[], int]) -> None:
        """Start before this process's first step. told returns the number of a signal that asks to stop, or 0."""
        self._told, self._last = told, time.monotonic()

    def after_step(self, placed: Placed, report: StepReport, train: TrainConfig) -> bool:
        """Evaluate if it is time; return whether the run ends. Raises: NonFiniteLoss; as Best.write."""
        standing = self.standing
        if standing.evaluated < report.step and self._is_due(report, train, placed.processes):
            if placed.processes.largest(self._told()):
                return False  # the run is about to stop and has little time; it evaluates when it is resumed
            try:
                self._evaluate(placed, report, train)
            except _Interrupted:
                return False
            self._last = time.monotonic()
        return standing.stopped

    def take_state(self) -> dict[str, Tensor]:
        """Return the tensors that put_state needs."""
        if self._best is not None:  # the checkpoint being written will record this best step
            self._best.resumed = self.standing.best or None
        return {_STATE: torch.tensor([float(value) for value in vars(self.standing).values()], dtype=torch.float64)}

    def put_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore the standing. If the saved run had no validation, keep the initial standing."""
        if _STATE not in tensors:
            return
        evaluated, best, best_loss, to_undercut, without, stopped = tensors[_STATE].tolist()
        self.standing = Standing(int(evaluated), int(best), best_loss, to_undercut, int(without), bool(stopped))
        if self._best is not None:
            self._best.resumed = self.standing.best or None

    def _is_due(self, report: StepReport, train: TrainConfig, processes: Processes) -> bool:
        if report.step == report.steps:
            return True
        if train.eval_every is not None:
            return report.step % train.eval_every == 0
        assert train.eval_minutes is not None, "a run that is not evaluated has no Validation"
        late = processes.first and time.monotonic() - self._last >= 60 * train.eval_minutes
        return bool(processes.largest(int(late)))

    def _evaluate(self, placed: Placed, report: StepReport, train: TrainConfig) -> None:
        runner, processes = placed.runner, placed.processes
        assert runner is not None, "the training loop has started it"
        begin, before = time.perf_counter(), take_random_states()
        try:
            with self._shown(report.step) as advance:

                def on_batch(rows: int, tokens: int) -> None:
                    advance(rows, tokens)
                    if processes.count == 1 and self._told():
                        raise _Interrupted

                options: dict[str, Any] = {"objective": self._objective, "on_batch": on_batch}
                result = evaluate(placed, self._dataset, batch_size=self._batch_size, **options)
        finally:
            put_random_states(before)
        loss = result.objective_loss
        if not math.isfinite(loss):
            raise NonFiniteLoss(
                f"the validation loss must stay finite, got {loss} after step {report.step} of {report.steps}: "
                f"lower train.lr (now {train.lr:g})"
            )
        self._judge(report.step, loss, train)
        if self._best is not None and self.standing.best == report.step:
            learned = runner.states.result() if processes.first or runner.in_lockstep else {}
            if processes.first:
                self._best.write(learned, report.step, loss)
        if self._on_result is not None:
            self._on_result(report.step, result, time.perf_counter() - begin, self.standing)

    def _judge(self, step: int, loss: float, train: TrainConfig) -> None:
        standing = self.standing
        standing.evaluated = step
        if loss < standing.best_loss:
            standing.best, standing.best_loss = step, loss
        if loss < standing.to_undercut - train.min_delta:
            standing.to_undercut, standing.without = loss, 0
        else:
            standing.without += 1
        standing.stopped = train.patience is not None and standing.without >= train.patience


@dataclass(frozen=True)
class Ended:
    """How a run ended: the exported step, the last step that was taken, and the planned number of steps."""

    exported: int
    last: int
    steps: int

    @property
    def note(self) -> str | None:
        return None if self.last == self.steps else f"stopped early, after step {self.last} of {self.steps}"

    @property
    def words(self) -> str:
        """Words for the table; empty if the last of all steps is exported."""
        if self.exported == self.steps:
            return ""
        at = f" step {self.exported}, the best of {self.last}" if self.exported != self.last else f" step {self.last}"
        return f"{at} (stopped early, of {self.steps})" if self.note else at

    @property
    def numbers(self) -> dict[str, int]:
        """The same for table.json, as numbers."""
        return {} if self.exported == self.steps else {"step": self.exported, "steps": self.last, "of": self.steps}


def validation_message(result: Evaluation, step: int, standing: Standing, train: TrainConfig) -> str:
    """Return a line about an evaluation, compared with the earlier ones."""
    figures = f"loss {result.loss:.4f} nats per token, accuracy {100 * result.accuracy:.2f} %"
    if result.figures:  # they include the loss that is compared
        figures = ", ".join(f"{name} {figure:.4f}" for name, figure in result.figures.items())
    place = "the least so far" if standing.best == step else f"least: {standing.best_loss:.4f} at step {standing.best}"
    left = "" if train.patience is None or not standing.without else f", {standing.without} of {train.patience}"
    scored = f"{int(result.tokens.sum())} tokens of {len(result.documents)} documents"
    return f"{figures} ({scored}); {place}{f' ({left[2:]} without a lower one)' if left else ''}"


def stop_message(standing: Standing, last: StepReport, train: TrainConfig) -> str:
    """Return a line that says why a run ended early."""
    by = f" by more than {train.min_delta:g}" if train.min_delta else ""
    return (
        f"stopped early after step {last.step} of {last.steps}: {standing.without} evaluations without a loss below "
        f"{standing.to_undercut:.4f}{by}"
    )
