"""What regimes train on the linears of all layers: weights, adapters or a mask; and the model where a run begins."""

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from mft.config import MaskConfig
from mft.masks.targets import select_targets
from mft_study.arms.adapters import Lora
from mft_study.arms.arm import Arm, Ground
from mft_study.arms.full import Control
from mft_study.arms.masks import Mask
from mft_study.arms.setting import Setting

from .runs import Run


@dataclass(frozen=True)
class Way:
    """What is trained, how it is learned together, and the rates to choose from."""

    arm: Callable[..., Arm]
    method: Callable[..., Any]  # a Federation
    rates: list[float]


# Arms without their rates; the mask's threshold is free, the best of the stored studies.
control_arm, lora_arm = functools.partial(Control, "control"), functools.partial(Lora, "lora")
mask_arm = functools.partial(Mask, "mask", mode="value", threshold=0.0)


def ground_of(model: nn.Module, arm: Arm, run: Run) -> Ground:
    """Return where a run of the arm begins. ``model`` is the base."""
    mask = dataclasses.replace(arm.mask_config(MaskConfig()), seed=run.seed)
    layers = select_targets(model, mask)
    return Ground(model, model, layers, mask, Setting(lr=run.lr), run.seed, lambda: None)
