"""The models of finished units, made again from their files."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from mft.files.atomic import atomic_file
from mft.models.causal_lm import clone_with_own_weights
from mft.models.linears import weight_name
from mft.study.arms.compress import compressed, compressed_weights, compute_in_fp32, factors_of, learn_factors
from mft.study.arms.job import Job, Weights, arm_of, mask_of, rank_of
from mft.study.config import (
    AVERAGE,
    BASE,
    BITDELTA,
    COMPRESSED,
    CONTROL,
    FULL,
    INTERPOLATED,
    LORA,
    ONE_SHOT,
    TEMPERATURE,
)
from mft.study.lora import add_lora, merge_lora
from mft.study.one_shot import one_shot_mask
from mft.study.outcome import Unit
from mft.study.workspace import Workspace, with_weights


def model_of(workspace: Workspace, job: Job) -> nn.Module:
    """The unit's model as its files have it, in eval mode; after workspace.begin."""
    unit, arm = job.unit, arm_of(workspace, job.unit)
    if arm.kind in (BASE, FULL, TEMPERATURE):
        return workspace.model
    if arm.kind == AVERAGE:
        return with_weights(workspace.model, _mean([_merged(workspace, part, path) for part, path in job.parts])).eval()
    if arm.kind in ONE_SHOT:
        clone, dataset = clone_with_own_weights(workspace.model), workspace.splits(unit.domain).train
        return one_shot_mask(clone, mask_of(workspace, unit), arm.kind, dataset).eval()
    if arm.kind == INTERPOLATED:
        assert job.source is not None
        assert unit.setting.alpha is not None
        weights = _interpolated(workspace, _merged(workspace, *job.source), unit.setting.alpha)
        return with_weights(workspace.model, weights).eval()
    if arm.kind in COMPRESSED and not arm.lrs:
        return _compressed(workspace, job, {})
    return trained_model(workspace, job, load_file(job.trained))


def save_weights(weights: Weights, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as scratch:
        save_file({name: weight.contiguous() for name, weight in weights.items()}, scratch)


def trained_model(workspace: Workspace, job: Job, weights: Weights) -> nn.Module:
    """The model of a trained unit whose file holds these weights, in eval mode."""
    arm = arm_of(workspace, job.unit)
    if arm.kind == BITDELTA:
        return _compressed(workspace, job, factors_of(weights))
    if arm.kind == LORA:
        return _with_adapters(workspace, job.unit, weights).eval()
    return with_weights(workspace.model, weights).eval()


def with_scales(workspace: Workspace, job: Job) -> nn.Module:
    """A model of bitdelta whose scales can be trained, and nothing else."""
    starts, trained = _starts_and_ends(workspace, job)
    steps = {name: compressed(BITDELTA, end.float() - starts[name].float()) for name, end in trained.items()}
    return learn_factors(compute_in_fp32(clone_with_own_weights(workspace.model), steps), steps)


def _compressed(workspace: Workspace, job: Job, factors: Weights) -> nn.Module:
    arm, share = arm_of(workspace, job.unit), job.unit.setting.share
    weights = compressed_weights(arm.kind, *_starts_and_ends(workspace, job), share, factors)
    model = workspace.model
    if workspace.study.arms[str(arm.of)].kind == CONTROL:  # whose weights are nowhere tied
        model = compute_in_fp32(clone_with_own_weights(model), weights)
    return with_weights(model, weights).eval()


def _starts_and_ends(workspace: Workspace, job: Job) -> tuple[Weights, Weights]:
    """What the unit's source trained, before and after."""
    assert job.source is not None
    trained = load_file(job.source[1])
    return {name: workspace.model.get_parameter(name).detach().cpu() for name in trained}, trained


def _with_adapters(workspace: Workspace, unit: Unit, weights: Weights) -> nn.Module:
    names, _ = workspace.layers_of(arm_of(workspace, unit))
    model = add_lora(clone_with_own_weights(workspace.model), names, rank_of(workspace, unit), 0)
    with torch.no_grad():
        for name, weight in weights.items():
            model.get_parameter(name).copy_(weight)
    return model


def _merged(workspace: Workspace, part: Unit, path: Path) -> Weights:
    """A part's weights in the names of the ordinary model."""
    arm, weights = arm_of(workspace, part), load_file(path)
    if arm.kind != LORA:
        return weights
    names, _ = workspace.layers_of(arm)
    merged = merge_lora(_with_adapters(workspace, part, weights))
    return {(weight := weight_name(merged, name)): merged.get_parameter(weight).detach() for name in names}


def _interpolated(workspace: Workspace, weights: Weights, alpha: float) -> Weights:
    """start + alpha * (trained - start), in fp64, rounded once."""
    found = {}
    for name, weight in weights.items():
        start = workspace.model.get_parameter(name).detach().double().cpu()
        found[name] = (start + alpha * (weight.double() - start)).to(weight.dtype)
    return found


def _mean(parts: list[Weights]) -> Weights:
    return {
        name: torch.stack([part[name].double() for part in parts]).mean(0).to(weight.dtype)
        for name, weight in parts[0].items()
    }
