"""The arms that train: from their start to weights that go onto it (masks merged, adapters apart).

Each is evaluated on validation at study.checkpoints equally spaced steps; the best of them is kept on disk.
"""

import copy
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from mft.config import DATA_INITS, INITS
from mft.data.streams import count_rows
from mft.importance.scores import initialise_scores, mask_from_data
from mft.masks.convert import came_from_conv1d, mask_model, masked_modules
from mft.masks.inspection import flip_share, initial_masks
from mft.models.causal_lm import clone_with_own_weights
from mft.models.linears import weight_name
from mft.objectives.distillation import Distillation
from mft.rewards.questions import count_questions
from mft.rewards.teacher import QUESTION, OnPolicyTeacher
from mft.rewards.train import RewardReport, train_rewards
from mft.study.arms.job import Job, Weights, arm_of, mask_of, rank_of
from mft.study.arms.measure import keeps_prefix, on_general, on_validation
from mft.study.arms.memory import training_bytes
from mft.study.arms.models import save_weights, trained_model, with_scales
from mft.study.arms.size import stored_bytes
from mft.study.config import BITDELTA, CONTINUED, CONTROL, FULL, LORA, MASK, REWARDS, ArmConfig
from mft.study.lora import add_lora
from mft.study.outcome import Measured, Outcome, Unit
from mft.study.workspace import Workspace
from mft.training.loop import StepReport, finetune, train_loop, train_masks, train_weights

_PART_SEEDS = 1_000_003  # between the orders of data of an average's parts, more than seeds that anyone declares


def train_unit(workspace: Workspace, job: Job) -> Outcome:
    """Train it, see it on validation now and then, and keep the best of these checkpoints on disk."""
    unit, arm = job.unit, arm_of(workspace, job.unit)
    train = workspace.study.train_of(arm, unit.setting, unit.seed + _PART_SEEDS * unit.part)
    dataset = workspace.splits(unit.domain).train
    model = with_scales(workspace, job) if arm.kind == BITDELTA else _untrained(workspace, unit, arm)
    initial = initial_masks(model)
    config = None
    if workspace.study.objective == REWARDS and arm.kind != FULL:
        dataset = workspace.questions(unit.domain).train
        config = workspace.study.rewards_of(arm, unit.setting, train.seed, count_questions(dataset))
    checkpoints = _Checkpoints(
        train.steps_for(count_rows(dataset)) if config is None else config.steps,
        1 if arm.kind == FULL else workspace.study.checkpoints,
        lambda: on_validation(workspace, unit, model),
        lambda: (_trained_weights(workspace, model), flip_share(model, initial) if initial else None),
    )
    options: dict[str, Any] = {"on_step": checkpoints.on_step}
    if config is None and keeps_prefix(arm.kind):
        options["memory"] = workspace.memory("train", workspace.layers_of(arm)[1])
    if config is None and job.teacher is not None:
        options["objective"] = Distillation(workspace.teacher(unit.domain, job.teacher), weight=0.0)
    reports: Sequence[StepReport | RewardReport]
    if config is not None:
        let_learn(model, arm.kind, workspace.layers_of(arm)[0])
        if job.teacher is not None:
            teacher = workspace.teaching_model(unit.domain, job.teacher)
            options["teacher"] = OnPolicyTeacher(teacher, arm.teacher_prompt or QUESTION)
        reports = train_rewards(model, workspace.tokenizer, dataset, config, **options)
    elif arm.kind in (FULL, CONTINUED):
        reports = finetune(model, dataset, train, **options)
    elif arm.kind == CONTROL:
        reports = train_weights(model, workspace.layers_of(arm)[0], dataset, train, **options)
    elif arm.kind == MASK:
        reports = train_masks(model, dataset, train, **options)
    else:
        reports = train_loop(model, dataset, train, **options)
    assert checkpoints.best is not None  # the last step is a checkpoint
    weights, flips = checkpoints.kept
    save_weights(weights, job.trained)
    best = trained_model(workspace, job, weights)
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
        bytes=stored_bytes(workspace, job, best),
        memory=training_bytes(workspace, unit),
        general=on_general(workspace, unit, best, "validation"),
    )


class _Checkpoints:
    """An on_step of the training loop that evaluates now and then, and keeps what was best."""

    def __init__(
        self, steps: int, count: int, look: Callable[[], Measured], keep: Callable[[], tuple[Weights, float | None]]
    ) -> None:
        self.at = {math.ceil(steps * i / count) for i in range(1, count + 1)}
        self.curve: list[tuple[float, float]] = []
        self.answers_curve: list[tuple[float, float]] = []
        self.best: Measured | None = None
        self.best_share = 1.0
        self.seconds, self._looking = 0.0, 0.0  # of training alone
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


def let_learn(model: nn.Module, kind: str, layers: Sequence[str]) -> None:
    """What an arm of this kind trains requires grad, and nothing else; adapters do so since they were made."""
    if kind == LORA:
        return
    model.requires_grad_(kind == CONTINUED)
    if kind == CONTROL:
        for name in layers:
            model.get_parameter(weight_name(model, name)).requires_grad_(True)
    for module in masked_modules(model).values():
        module.scores.requires_grad_(True)


def _untrained(workspace: Workspace, unit: Unit, arm: ArmConfig) -> nn.Module:
    """A clone of the fine-tune (for the full fine-tune: of the base), with what the arm trains added."""
    study, dataset = workspace.study, workspace.splits(unit.domain).train
    if arm.kind in (FULL, CONTINUED):
        return copy.deepcopy(workspace.model)
    if arm.kind == CONTROL:
        return clone_with_own_weights(workspace.model, workspace.layers_of(arm)[0])
    model = clone_with_own_weights(workspace.model)
    if arm.kind == LORA:
        return add_lora(model, workspace.layers_of(arm)[0], rank_of(workspace, unit), unit.seed)
    init = arm.init or study.mask.init
    if init in DATA_INITS:
        return mask_from_data(model, mask_of(workspace, unit, init=init), dataset)
    mask_model(model, mask_of(workspace, unit, init=init if init in INITS else "constant"))
    return model if init in INITS else initialise_scores(model, init, dataset, seed=unit.seed)


def _trained_weights(workspace: Workspace, model: nn.Module) -> Weights:
    """What was trained, on the CPU: masks as the weights that they leave, all else as it is."""
    masked = masked_modules(model)
    if not masked:
        return {name: p.detach().to("cpu", copy=True) for name, p in model.named_parameters() if p.requires_grad}
    weights = {}
    for name, module in masked.items():
        kept = module.merged_weight()
        weights[weight_name(workspace.model, name)] = (
            (kept.t() if came_from_conv1d(module) else kept).cpu().contiguous()
        )
    return weights
