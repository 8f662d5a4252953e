"""Train an arm from its start to weights that are put onto the start (masks merged, adapters separate).

An arm is evaluated on validation at study.checkpoints equally spaced steps, and the best checkpoint is kept on disk.
"""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

from mft.data.streams import count_rows
from mft.masks.inspection import flip_share, initial_masks
from mft.objectives.distillation import Distillation
from mft.rewards.on_policy_teacher import QUESTION, OnPolicyTeacher
from mft.rewards.questions import count_questions
from mft.rewards.train_rewards import RewardReport, train_rewards
from mft.training.loop import StepReport
from mft_study.arms.size import weights_bytes
from mft_study.arms.weights import Weights, save_weights
from mft_study.config import REWARDS
from mft_study.outcome import Measured, Outcome
from mft_study.units.job import Job, arm_of, ground_of
from mft_study.units.measure import measure_general, measure_validation
from mft_study.workspace import Workspace

_PART_SEEDS = 1_000_003  # distance between the data seeds of an average's parts: larger than any declared seed


def train_unit(workspace: Workspace, job: Job) -> Outcome:
    """Train a unit, evaluate checkpoints on validation, and keep the best one on disk."""
    unit, arm, ground = job.unit, arm_of(workspace, job.unit), ground_of(workspace, job)
    train = workspace.study.train_of(arm, unit.setting, unit.seed + _PART_SEEDS * unit.part)
    dataset = workspace.splits(unit.domain).train
    model = arm.untrained(ground)
    initial = initial_masks(model)
    config = None
    if workspace.study.objective == REWARDS and arm.follows:
        dataset = workspace.questions(unit.domain).train
        config = workspace.study.rewards_of(arm, unit.setting, train.seed, count_questions(dataset))
    checkpoints = _Checkpoints(
        train.steps_for(count_rows(dataset)) if config is None else config.steps,
        workspace.study.checkpoints if arm.follows else 1,
        lambda: measure_validation(workspace, unit, model),
        lambda: (arm.trained_weights(model, ground), flip_share(model, initial) if initial else None),
    )
    options: dict[str, Any] = {"on_step": checkpoints.on_step}
    if config is None and not arm.whole_model:
        options["memory"] = workspace.memory("train", workspace.layers_of(arm, unit.setting)[1])
    if config is None and job.teacher is not None:
        options["objective"] = Distillation(workspace.teacher(unit.domain, job.teacher), weight=0.0)
    reports: Sequence[StepReport | RewardReport]
    if config is not None:
        if job.teacher is not None:
            teacher = workspace.teaching_model(unit.domain, job.teacher)
            options["teacher"] = OnPolicyTeacher(teacher, arm.teacher_prompt or QUESTION)
        reports = train_rewards(model, workspace.tokenizer, dataset, config, **options)
    else:
        reports = arm.train(model, ground, dataset, train, **options)
    assert checkpoints.best is not None  # the last step is a checkpoint
    weights, flips = checkpoints.kept
    save_weights(weights, job.trained)
    best = arm.model_with(ground, weights)
    return Outcome(
        unit,
        checkpoints.best,
        checkpoints.curve,
        best_share=checkpoints.best_share,
        answers_curve=checkpoints.answers_curve,
        rewards=[report.reward for report in reports if isinstance(report, RewardReport)],
        steps=len(reports),
        tokens=sum(report.tokens for report in reports),
        seconds=checkpoints.seconds,
        flips=flips,
        bytes=arm.stored_bytes(ground, best),
        resident=arm.resident_bytes(ground, best),
        # a start over codes counts as codes
        memory=weights_bytes(workspace.base, ground.codes) + arm.training_bytes(ground, workspace.study.stage),
        general=measure_general(workspace, unit, best, "validation"),
    )


class _Checkpoints:
    """Provides the training loop's on_step, which evaluates checkpoints and keeps the best."""

    def __init__(
        self, steps: int, count: int, look: Callable[[], Measured], keep: Callable[[], tuple[Weights, float | None]]
    ) -> None:
        self.at = {math.ceil(steps * i / count) for i in range(1, count + 1)}
        self.curve: list[tuple[float, float]] = []
        self.answers_curve: list[tuple[float, float]] = []
        self.best: Measured | None = None
        self.best_share = 1.0
        self.seconds, self._looking = 0.0, 0.0  # training time without evaluations
        self._look, self._keep = look, keep

    def on_step(self, report: StepReport | RewardReport) -> None:
        self.seconds = report.seconds - self._looking
        if report.step not in self.at:
            return
        begin = time.perf_counter()
        measured, share = self._look(), report.step / report.steps
        self.curve.append((share, measured.evaluation.loss))
        if measured.exact is not None:
            self.answers_curve.append((share, measured.exact))
        if self.best is None or measured.choice < self.best.choice:
            self.best, self.best_share, self.kept = measured, share, self._keep()
        self._looking += time.perf_counter() - begin
