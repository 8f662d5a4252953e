"""The arm whose only change to the fine-tune is one number that validation chooses."""

from pathlib import Path

from torch import nn

from mft.study.arms.arm import Arm, Ground
from mft.study.arms.size import NUMBER


class Temperature(Arm):
    """The fine-tune with its logits scaled."""

    tuned = False
    tempered = True

    def model(self, ground: Ground, path: Path) -> nn.Module:
        return ground.start

    def stored_bytes(self, ground: Ground, model: nn.Module) -> int:
        return NUMBER

    def resident_bytes(self, ground: Ground, model: nn.Module) -> int:
        return NUMBER
