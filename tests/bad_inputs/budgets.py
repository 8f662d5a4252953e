"""Masks under one budget for all layers, on the same Llama."""

import dataclasses

import torch
from tiny import make_llama, make_rows

from mft.config import MaskConfig, TrainConfig
from mft.masks.convert import mask_model, masked_modules
from mft.masks.peft import MaskPeftConfig
from mft.training.loop import train_masks
from mft_kernels.ops.checks import NonFiniteScores
from mft_study.ablate import derive
from mft_study.arms.kinds import make_arm
from mft_study.load import load_study
from mft_study.one_shot import one_shot_mask


def budgeted(**changes):
    return mask_model(make_llama(), MaskConfig(**{"budget": 0.03, "layers_to_transform": 3} | changes))


TABLE = r"""
a budget of nothing
    MaskConfig(budget=0)
    -> ValueError: budget | must lie in (0, 1) (or null) | got 0.0
a budget of nan
    MaskConfig(budget=float("nan"))
    -> ValueError: budget | must be a finite number | got nan
a budget for each layer
    MaskConfig(budget=[0.01, 0.02])
    -> ValueError: budget | must be a number or null | got [0.01, 0.02] (list)
a budget beside a keep ratio
    MaskConfig(budget=0.006, keep_ratio=0.9)
    -> ValueError: keep_ratio | must be left out when budget = 0.006 is set | got 0.9
a budget beside a threshold
    MaskConfig(budget=0.006, mode="value", threshold=0)
    -> ValueError: threshold | must be null when budget = 0.006 is set, because a budget finds the threshold | got 0.0
a ramp of no budget
    MaskConfig(keep_ratio=0.9, budget_ramp=0.5)
    -> ValueError: budget_ramp | must be left out without budget | got 0.5
a ramp longer than the run
    MaskConfig(budget=0.006, budget_ramp=1.5)
    -> ValueError: budget_ramp | must lie in [0, 1] | got 1.5
an adapter under a budget beside a keep ratio
    MaskPeftConfig(budget=0.006, keep_ratio=0.9)
    -> ValueError: keep_ratio | must be left out when budget = 0.006 is set | got 0.9
a budget of less than a weight
    budgeted(budget=1e-9)
    -> ValueError: budget | must be at least 0.00011, one of the 9216 masked weights | got 1e-09
scores under a budget that are not finite
    model = budgeted()
    masked_modules(model)["model.layers.3.mlp.up_proj"].scores.data[0, 0] = torch.nan
    train_masks(model, make_rows(), TrainConfig(steps=1), way="layerwise")
    -> NonFiniteScores: scores of module 'model.layers.3.mlp.up_proj' | must be finite | got 1 NaN or Inf
        | lower the learning rate
a mask found in one shot under a budget
    one_shot_mask(make_llama(), MaskConfig(budget=0.01), "magnitude", None)
    -> ValueError: mask.budget | must be null for a one-shot mask: give keep_ratio | got 0.01
a study whose arms would all have a budget
    study = load_study("small")
    dataclasses.replace(study, mask=dataclasses.replace(study.mask, keep_ratio=None, budget=0.006))
    -> ValueError: mask.budget | must be null: an arm has it | got 0.006
an arm with a budget and keep ratios
    make_arm("mask", lrs=[1e-3], budget=0.006, keep_ratios=[0.9])
    -> ValueError: keep_ratios | must be left out when budget is set | got [0.9]
an arm with a budget and a threshold
    make_arm("mask", lrs=[1e-3], budget=0.006, mode="value", threshold=0.1)
    -> ValueError: threshold | must be left out when budget is set | got 0.1
an arm with a ramp of no budget
    make_arm("mask", lrs=[1e-3], budget_ramp=0.5)
    -> ValueError: budget_ramp | must be left out without budget | got 0.5
an ablation of keep ratios of masks under a budget
    study = load_study("small")
    arms = {name: make_arm("mask", lrs=[1e-3], budget=0.006) for name, arm in study.arms.items() if arm.is_mft}
    derive(dataclasses.replace(study, arms=study.arms | arms), "ratio")
    -> ValueError: arms | must hold a mask without a threshold or a budget to be ablated by ratio | got MFT
a budget of weights that are all alike
    model = make_llama()
    for layer in model.model.layers:
        layer.mlp.up_proj.weight.data.fill_(-0.5)
    mask_model(model, MaskConfig(budget=0.5, budget_ramp=0, target_modules=["up_proj"]))
    assert all(module.mask().all() for module in masked_modules(model).values())
    -> accepted: ties are all kept: nothing is dropped until the scores have moved
"""
