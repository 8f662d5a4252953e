"""The arm whose only change to the fine-tune is one number that validation chooses."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mft_study.arms.arm import Arm, Ground
from mft_study.arms.size import NUMBER

if TYPE_CHECKING:
    from torch import nn


class Temperature(Arm):
    """The fine-tune with its logits scaled."""

    tuned = False
    tempered = True

    def model(self, ground: Ground, path: Path) -> nn.Module:
        return ground.start

    def stored_bytes(self, ground: Ground, model: nn.Module) -> int:
        return NUMBER
