"""What each kind of arm does: from a fine-tune to a trained model, seen by validation, and later by test.

Every arm after the full fine-tune starts from it. A trained one is evaluated on validation at study.checkpoints equally
spaced steps; the best of them is kept on disk, as weights that go onto the fine-tune (masks merged, adapters apart).
"""

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mft.config import INITS, MaskConfig
from mft.data.streams import count_rows
from mft.evaluation.evaluate import Evaluation, evaluate
from mft.evaluation.exact_match import exact_matches
from mft.evaluation.temperature import evaluate_tempered, fit_temperature
from mft.files.atomic import atomic_file
from mft.importance.scores import initialise_scores
from mft.masks.convert import came_from_conv1d, mask_model, masked_modules
from mft.masks.inspection import flip_share, initial_masks
from mft.models.causal_lm import clone_with_own_weights
from mft.models.linears import weight_name
from mft.study.config import (
    AVERAGE,
    BASE,
    CONTINUED,
    CONTROL,
    FULL,
    LORA,
    MASK,
    ONE_SHOT,
    TEMPERATURE,
    TRAINED,
    ArmConfig,
)
from mft.study.lora import add_lora, merge_lora
from mft.study.one_shot import one_shot_mask
from mft.study.outcome import Measured, Outcome, Tested, Unit
from mft.study.workspace import ROWS, Workspace, with_layers_remembered, with_weights
from mft.training.loop import NonFiniteLoss, StepReport, finetune, train_loop, train_masks, train_weights
from mft_kernels.checks import NonFiniteScores

Weights = dict[str, Tensor]
_PART_SEEDS = 1_000_003  # between the orders of data of an average's parts, more than seeds that anyone declares


@dataclass(frozen=True)
class Job:
    """A unit and the files that it needs."""

    unit: Unit
    start: Path | None  # the fine-tune's trained weights; None: the base model
    trained: Path  # where the unit's own are, or go
    parts: tuple[tuple[Unit, Path], ...] = ()  # of an average: what its mean is of
    on_test: bool = False


def run_unit(workspace: Workspace, job: Job) -> Outcome:
    """Train what the unit trains, and see it on validation. A run that does not stay finite is an outcome too."""
    unit, kind = job.unit, _arm(workspace, job.unit).kind
    workspace.begin(unit.domain, job.start)
    try:
        if kind in (FULL, *TRAINED):
            return _train(workspace, job)
        model = _model_of(workspace, job)
        if kind == TEMPERATURE:
            validation, options = (
                workspace.splits(unit.domain).validation,
                _options(workspace, _arm(workspace, unit))("validation"),
            )
            temperature = fit_temperature(model, validation, **options)
            tempered = evaluate_tempered(model, validation, temperature, **options)
            measured = Measured(tempered, tempered, temperature)
        else:
            measured = Measured(_on_validation(workspace, unit, model))
    except (NonFiniteLoss, NonFiniteScores) as error:
        return Outcome(unit, None, diverged=str(error))
    return Outcome(unit, measured, [(1.0, measured.evaluation.loss)])


def run_test(workspace: Workspace, job: Job) -> Tested:
    """Evaluate a unit's model on validation again, and on test; each also at the temperature that validation likes."""
    unit, kind = job.unit, _arm(workspace, job.unit).kind
    workspace.begin(unit.domain, job.trained if kind == FULL else job.start)
    model, splits = _model_of(workspace, job), workspace.splits(unit.domain)
    options, temperature = _options(workspace, _arm(workspace, unit)), 0.0
    measured = {}
    for split in ("validation", "test"):
        dataset = getattr(splits, split)
        remembering = with_layers_remembered(model, dataset, **options(split))
        if split == "validation":
            temperature = fit_temperature(model, dataset, **remembering)
        tempered = evaluate_tempered(model, dataset, temperature, **remembering)
        plain = tempered if kind == TEMPERATURE else evaluate(model, dataset, **remembering)
        measured[split] = Measured(plain, tempered, temperature)
        if unit.domain in workspace.study.answers:
            answers, questions = exact_matches(model, workspace.tokenizer, dataset)
            measured[split].answers, measured[split].questions = answers, questions
    return Tested(unit, measured["validation"], measured["test"])


# ---------------------------------------------------------------------------------------------- training


def _train(workspace: Workspace, job: Job) -> Outcome:
    unit, arm = job.unit, _arm(workspace, job.unit)
    train = workspace.study.train_of(arm, unit.setting, unit.seed + _PART_SEEDS * unit.part)
    dataset = workspace.splits(unit.domain).train
    model = _untrained(workspace, unit, arm)
    initial = initial_masks(model)
    checkpoints = _Checkpoints(
        train.steps_for(count_rows(dataset)),
        1 if arm.kind == FULL else workspace.study.checkpoints,
        lambda: _on_validation(workspace, unit, model),
        lambda: (_trained_weights(workspace, model), flip_share(model, initial) if initial else None),
    )
    options: dict[str, Any] = {"on_step": checkpoints.on_step}
    if _keeps_prefix(arm.kind):
        options["memory"] = workspace.memory("train", workspace.layers_of(arm)[1])
    if arm.kind in (FULL, CONTINUED):
        reports = finetune(model, dataset, train, **options)
    elif arm.kind == CONTROL:
        reports = train_weights(model, workspace.layers_of(arm)[0], dataset, train, **options)
    elif arm.kind == MASK:
        reports = train_masks(model, dataset, train, **options)
    else:
        reports = train_loop(model, dataset, train, **options)
    assert checkpoints.best is not None  # the last step is a checkpoint
    weights, flips = checkpoints.kept
    _save(weights, job.trained)
    return Outcome(
        unit,
        Measured(checkpoints.best),
        checkpoints.curve,
        best_share=checkpoints.best_share,
        steps=len(reports),
        tokens=sum(report.tokens for report in reports),
        seconds=checkpoints.seconds,
        flips=flips,
    )


class _Checkpoints:
    """An on_step of the training loop that evaluates now and then, and keeps what was best."""

    def __init__(
        self, steps: int, count: int, look: Callable[[], Evaluation], keep: Callable[[], tuple[Weights, float | None]]
    ) -> None:
        self.at = {math.ceil(steps * i / count) for i in range(1, count + 1)}
        self.curve: list[tuple[float, float]] = []
        self.best: Evaluation | None = None
        self.best_share = 1.0
        self.seconds, self._looking = 0.0, 0.0  # of training alone
        self._look, self._keep = look, keep

    def on_step(self, report: StepReport) -> None:
        self.seconds = report.seconds - self._looking
        if report.step not in self.at:
            return
        begin = time.perf_counter()
        evaluation, share = self._look(), report.step / report.steps
        self.curve.append((share, evaluation.loss))
        if self.best is None or evaluation.loss < self.best.loss:
            self.best, self.best_share, self.kept = evaluation, share, self._keep()
        self._looking += time.perf_counter() - begin


def _untrained(workspace: Workspace, unit: Unit, arm: ArmConfig) -> nn.Module:
    """A clone of the fine-tune (for the full fine-tune: of the base), with what the arm trains added."""
    study, dataset = workspace.study, workspace.splits(unit.domain).train
    if arm.kind in (FULL, CONTINUED):
        return copy.deepcopy(workspace.model)
    if arm.kind == CONTROL:
        return clone_with_own_weights(workspace.model, workspace.layers_of(arm)[0])
    model = clone_with_own_weights(workspace.model)
    if arm.kind == LORA:
        return add_lora(model, workspace.layers_of(arm)[0], arm.lora_rank, unit.seed)
    init = arm.init or study.mask.init
    mask_model(model, _mask_of(workspace, unit, init=init if init in INITS else "constant"))
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


def _save(weights: Weights, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as scratch:
        save_file({name: weight.contiguous() for name, weight in weights.items()}, scratch)


# ---------------------------------------------------------------------------------------------- trained models


def _model_of(workspace: Workspace, job: Job) -> nn.Module:
    """The unit's model as its files have it, in eval mode; after workspace.begin."""
    unit, arm = job.unit, _arm(workspace, job.unit)
    if arm.kind in (BASE, FULL, TEMPERATURE):
        return workspace.model
    if arm.kind == AVERAGE:
        return with_weights(workspace.model, _mean([_merged(workspace, part, path) for part, path in job.parts])).eval()
    if arm.kind in ONE_SHOT:
        clone, dataset = clone_with_own_weights(workspace.model), workspace.splits(unit.domain).train
        return one_shot_mask(clone, _mask_of(workspace, unit), arm.kind, dataset).eval()
    weights = load_file(job.trained)
    return (
        _with_adapters(workspace, arm, weights) if arm.kind == LORA else with_weights(workspace.model, weights)
    ).eval()


def _with_adapters(workspace: Workspace, arm: ArmConfig, weights: Weights) -> nn.Module:
    model = add_lora(clone_with_own_weights(workspace.model), workspace.layers_of(arm)[0], arm.lora_rank, 0)
    with torch.no_grad():
        for name, weight in weights.items():
            model.get_parameter(name).copy_(weight)
    return model


def _merged(workspace: Workspace, part: Unit, path: Path) -> Weights:
    """A part's weights in the names of the ordinary model."""
    arm, weights = _arm(workspace, part), load_file(path)
    if arm.kind != LORA:
        return weights
    names, _ = workspace.layers_of(arm)
    merged = merge_lora(_with_adapters(workspace, arm, weights))
    return {(weight := weight_name(merged, name)): merged.get_parameter(weight).detach() for name in names}


def _mean(parts: list[Weights]) -> Weights:
    return {
        name: torch.stack([part[name].double() for part in parts]).mean(0).to(weight.dtype)
        for name, weight in parts[0].items()
    }


# ---------------------------------------------------------------------------------------------- evaluation


def _arm(workspace: Workspace, unit: Unit) -> ArmConfig:
    """The unit's arm; a part of an average is a run of the arm that the average is of."""
    arm = workspace.study.arms[unit.arm]
    return workspace.study.arms[str(arm.of)] if unit.part else arm


def _mask_of(workspace: Workspace, unit: Unit, **changes: Any) -> MaskConfig:
    mask, keep_ratio = workspace.study.mask_of(_arm(workspace, unit)), unit.setting.keep_ratio
    if mask.threshold is None:
        assert keep_ratio is not None  # of an arm with a mask
        changes["keep_ratio"] = keep_ratio
    return replace(mask, seed=unit.seed, **changes)


def _keeps_prefix(kind: str) -> bool:
    """Whether a model of this kind shares the fine-tune's layers below the masked ones."""
    return kind not in (BASE, FULL, CONTINUED, AVERAGE)


def _options(workspace: Workspace, arm: ArmConfig) -> Callable[[str], dict[str, Any]]:
    """Of evaluate, for a split."""
    if not _keeps_prefix(arm.kind):
        return lambda split: {"batch_size": ROWS}
    _, first = workspace.layers_of(arm)
    return lambda split: {"batch_size": ROWS, "first": first, "memory": workspace.memory(split, first)}


def _on_validation(workspace: Workspace, unit: Unit, model: nn.Module) -> Evaluation:
    options = _options(workspace, _arm(workspace, unit))
    evaluation = evaluate(model, workspace.splits(unit.domain).validation, **options("validation"))
    if not math.isfinite(evaluation.loss):
        raise NonFiniteLoss(f"the loss must stay finite, got {evaluation.loss} on validation: lower the rate")
    return evaluation
