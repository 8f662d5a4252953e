"""What regimes train on the linears of all layers: weights, adapters or a mask; and the model where a run begins."""

import dataclasses

from torch import nn

from mft.config import MaskConfig
from mft.masks.targets import select_targets
from mft_study.arms.adapters import Lora
from mft_study.arms.arm import Arm, Ground
from mft_study.arms.full import Control
from mft_study.arms.masks import Mask
from mft_study.arms.setting import Setting

from .runs import Run


def control_arm(lrs: list[float]) -> Arm:
    return Control("control", lrs=lrs)


def lora_arm(lrs: list[float]) -> Arm:
    return Lora("lora", lrs=lrs)


def mask_arm(lrs: list[float]) -> Arm:
    """Return a mask arm with a free threshold, the best of the stored studies."""
    return Mask("mask", lrs=lrs, mode="value", threshold=0.0)


def ground_of(model: nn.Module, arm: Arm, run: Run) -> Ground:
    """Return where a run of the arm begins. ``model`` is the base."""
    mask = dataclasses.replace(arm.mask_config(MaskConfig()), seed=run.seed)
    layers = select_targets(model, mask)
    return Ground(model, model, layers, mask, Setting(lr=run.lr), run.seed, lambda: None)
