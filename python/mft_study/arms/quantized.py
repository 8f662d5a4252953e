"""The start rounded once to codes; arms that train over codes start there."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mft_study.arms.arm import Arm, Ground
from mft_study.arms.size import NUMBER, weights_bytes
from mft_study.arms.weights import Weights

if TYPE_CHECKING:
    from torch import nn


class Quantized(Arm):
    """Its start with the decoder's linear layers rounded to codes of `quantization`, over which arms then train."""

    takes = frozenset({"quantization", "start"})
    needs = frozenset({"quantization"})
    whole_model = True
    may_start = True
    over_codes = False
    makes_weights = True

    def made(self, ground: Ground) -> Weights | None:
        from mft.masks.quantize import rounded_weights

        return rounded_weights(ground.start, str(self.quantization))

    def stored_bytes(self, ground: Ground, model: nn.Module) -> int:
        return weights_bytes(ground.base, self.quantization, NUMBER)
