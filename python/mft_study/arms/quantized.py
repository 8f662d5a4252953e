"""The start rounded once to codes, at which other arms start, and what these trained put into the codes.

In the codes, an arm needs no further memory and no kernel of its own. Adapters are merged into the weights, which are
rounded to codes again, with new scales. A mask sets the codes of dropped weights to the code that stands for 0; all
other codes and scales stay.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mft.files.figure import COLOURS
from mft_study.arms.adapters import Adapters
from mft_study.arms.arm import Arm, Ground
from mft_study.arms.masks import Mask
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

    def made_weights(self, ground: Ground) -> Weights | None:
        from mft.masks.quantize import rounded_weights

        return rounded_weights(ground.start, str(self.quantization))

    def stored_bytes(self, ground: Ground, model: nn.Module) -> int:
        return weights_bytes(ground.base, self.quantization, NUMBER)


class InCodes(Arm):
    """The end of the arm `of`, which started over codes, in codes of the same kind."""

    takes = frozenset({"of"})
    needs = frozenset({"of"})
    near = True
    colour = COLOURS["in codes"]
    joined = False  # its sources are different arms
    makes_weights = True
    needs_codes = True

    def may_be_of(self, source: type[Arm]) -> bool:
        return issubclass(source, Adapters | Mask)

    def made_weights(self, ground: Ground) -> Weights:
        source = ground.source
        return source.arm.round_to_codes(ground.start, source.weights(ground), str(ground.codes))

    def stored_bytes(self, ground: Ground, model: nn.Module) -> int:
        """Return its source's: the codes can be made again from it and the start."""
        return ground.source.stored_bytes(ground, model)

    def resident_bytes(self, ground: Ground, model: nn.Module) -> int:
        """Return 0: the codes are as large as the start's and replace them."""
        return 0
