"""What another arm trained over codes, put into the codes: no bytes beside them in memory, and no kernel of its own.

Adapters are merged into the weights, and the weights are rounded to codes again, with new scales. A mask sets the codes
of what it drops to the code that stands for 0, which nf4 and int8 have; every other code and every scale stays, so the
model is the mask's own, to the bit.
"""

from torch import nn

from mft.files.figure import COLOURS
from mft.study.arms.adapters import Adapters
from mft.study.arms.arm import Arm, Ground
from mft.study.arms.masks import Mask
from mft.study.arms.weights import Weights


class InCodes(Arm):
    """The end of the arm `of`, which began over codes, in codes of the same kind."""

    takes = frozenset({"of"})
    needs = frozenset({"of"})
    near = True
    colour = COLOURS["in codes"]
    joined = False  # they are of different arms
    needs_codes = True

    def may_be_of(self, source: type[Arm]) -> bool:
        return issubclass(source, Adapters | Mask)

    @property
    def leaves_weights(self) -> bool:
        return True

    def made(self, ground: Ground) -> Weights:
        (source,) = ground.sources
        return source.arm.in_codes(ground.start, source.weights(ground), str(ground.codes))

    def stored_bytes(self, ground: Ground, model: nn.Module) -> int:
        """As its source's: whoever has the start makes the codes again."""
        (source,) = ground.sources
        return source.stored_bytes(ground, model)

    def resident_bytes(self, ground: Ground, model: nn.Module) -> int:
        """None: the codes are as large as the start's."""
        return 0
