"""Evaluation on validation while a run trains, and what follows from it: which step was the best, and when to stop.

    step   loss     best      patience 2, min_delta 0.01
      10   2.500    10        2.500 is to be undercut by more than 0.01
      20   2.495    20        1 without        (the best all the same)
      30   2.480    30        2.480 is to be undercut by more than 0.01
      40   2.481    30        1 without
      50   2.475    50        2 without: the run ends

Nothing of it reaches what is learned: the runner that trains evaluates, and random numbers are what they were.
"""

import math
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mft.config import TrainConfig
from mft.engines.distributed import ALONE, Processes
from mft.engines.randomness import put_random_states, take_random_states
from mft.engines.step import NonFiniteLoss, Runner, StepReport
from mft.evaluation.evaluate import Evaluation, evaluate
from mft.objectives.cross_entropy import CROSS_ENTROPY
from mft.objectives.objective import Objective
from mft.training.best import Best

_STATE = "validation.state"  # of a checkpoint: the fields of Standing, fp64

OnBatch = Callable[[int, int], None]
Shown = Callable[[int], AbstractContextManager[OnBatch]]


@dataclass
class Standing:
    """Where a run stands; losses in nats a token, steps from 1 and 0 for none."""

    evaluated: int = 0  # the step of the latest evaluation
    best: int = 0  # the step of the least loss, the earlier of equals
    best_loss: float = math.inf
    to_undercut: float = math.inf  # by more than min_delta
    without: int = 0  # evaluations that did not
    stopped: bool = False


class _Interrupted(Exception):
    """A signal came: the evaluation is left, and made when the run goes on."""


class Validation:
    """What train_loop asks after each step, as train.eval_every or train.eval_minutes says; it lies in checkpoints too.

    Args:
        dataset: rows that are held out.
        objective: that of training, by whose loss steps are compared.
        best: where the best step is kept; of several processes the first one writes.
        batch_size: rows at once.
        shown: shown(step) is entered while that step is evaluated, and gives what hears of each batch.
        on_result: called with step, evaluation, its seconds, and where the run stands then.
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
        """Before the first step of this process; told: the number of a signal that asks the run to end, or 0."""
        self._told, self._last = told, time.monotonic()

    def after_step(
        self, model: nn.Module, runner: Runner, report: StepReport, train: TrainConfig, processes: Processes = ALONE
    ) -> bool:
        """Evaluate if it is time, and not yet done; whether the run ends here.

        Raises: NonFiniteLoss; as evaluate and Best.write do.
        """
        standing = self.standing
        if standing.evaluated < report.step and self._is_due(report, train, processes):
            if processes.largest(self._told()):
                return False  # the run is about to stop, and has little time; it evaluates when it goes on
            try:
                self._evaluate(model, runner, report, train, processes)
            except _Interrupted:
                return False
            self._last = time.monotonic()
        return standing.stopped

    def take_state(self) -> dict[str, Tensor]:
        """What put_state needs."""
        if self._best is not None:  # it is about to be called so by a checkpoint
            self._best.resumed = self.standing.best or None
        return {_STATE: torch.tensor([float(value) for value in vars(self.standing).values()], dtype=torch.float64)}

    def put_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from there; from nothing, if the run was not evaluated then."""
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

    def _evaluate(
        self, model: nn.Module, runner: Runner, report: StepReport, train: TrainConfig, processes: Processes
    ) -> None:
        begin, before = time.perf_counter(), take_random_states()
        try:
            with self._shown(report.step) as advance:

                def on_batch(rows: int, tokens: int) -> None:
                    advance(rows, tokens)
                    if processes.count == 1 and self._told():
                        raise _Interrupted

                result = evaluate(
                    model,
                    self._dataset,
                    batch_size=self._batch_size,
                    objective=self._objective,
                    runner=runner,
                    processes=ALONE if runner.in_lockstep else processes,
                    on_batch=on_batch,
                )
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
            learned = runner.result() if processes.first or runner.in_lockstep else {}
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
    """How a run ended: the step that is exported, the last that was taken, and how many there should have been."""

    exported: int
    last: int
    steps: int

    @property
    def note(self) -> str | None:
        return None if self.last == self.steps else f"stopped early, after step {self.last} of {self.steps}"

    @property
    def words(self) -> str:
        """For the table: nothing where the last of all steps is exported."""
        if self.exported == self.steps:
            return ""
        at = f" step {self.exported}, the best of {self.last}" if self.exported != self.last else f" step {self.last}"
        return f"{at} (stopped early, of {self.steps})" if self.note else at

    @property
    def numbers(self) -> dict[str, int]:
        """For table.json: the same."""
        return {} if self.exported == self.steps else {"step": self.exported, "steps": self.last, "of": self.steps}


def said_of(result: Evaluation, step: int, standing: Standing, train: TrainConfig) -> str:
    """An evaluation, beside those before it."""
    figures = f"loss {result.loss:.4f} nats per token, accuracy {100 * result.accuracy:.2f} %"
    if result.figures:  # of which the loss is the one that is compared
        figures = ", ".join(f"{name} {figure:.4f}" for name, figure in result.figures.items())
    place = "the least so far" if standing.best == step else f"least: {standing.best_loss:.4f} at step {standing.best}"
    left = "" if train.patience is None or not standing.without else f", {standing.without} of {train.patience}"
    scored = f"{int(result.tokens.sum())} tokens of {len(result.documents)} documents"
    return f"{figures} ({scored}); {place}{f' ({left[2:]} without a lower one)' if left else ''}"


def said_of_stop(standing: Standing, last: StepReport, train: TrainConfig) -> str:
    """Why a run ended before its time."""
    by = f" by more than {train.min_delta:g}" if train.min_delta else ""
    return (
        f"stopped early after step {last.step} of {last.steps}: {standing.without} evaluations without a loss below "
        f"{standing.to_undercut:.4f}{by}"
    )
