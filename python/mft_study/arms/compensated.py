"""Arms without training whose later weights make up for the errors of earlier ones (see mft_study/compensated.py)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from mft.checks import Rule
from mft.files.figure import COLOURS
from mft_study.arms.arm import ON_LAYERS, Arm, Ground
from mft_study.arms.masks import OneShot
from mft_study.arms.size import NUMBER
from mft_study.arms.weights import Weights

if TYPE_CHECKING:
    from torch import Tensor, nn


class SparseGpt(OneShot):
    """A share of the weights dropped, and the others changed to make up for them."""

    def made_weights(self, ground: Ground) -> Weights:
        from mft_study.compensated import pruned

        keep_ratio, pattern = ground.mask.keep_ratio, ground.mask.pattern
        assert keep_ratio is not None, "one-shot masks have no threshold"
        return _made(ground, lambda weight, gram: pruned(weight, gram, keep_ratio, pattern))

    def stored_bytes(self, ground: Ground, model: nn.Module) -> int:
        """Return the bytes of the mask, 1 bit per weight, and of the kept weights, none of which is the start's."""
        kept = (model.get_parameter(name).count_nonzero() for name in ground.weight_names())
        return super().resident_bytes(ground, model) + NUMBER * sum(map(int, kept))

    def resident_bytes(self, ground: Ground, model: nn.Module) -> int:
        return self.stored_bytes(ground, model)


@dataclass
class Rounded(Arm):
    """The layers' weights rounded to equal steps, whose size is chosen for each group of a row."""

    bits: Annotated[int, Rule("lie from 2 to 8", minimum=2, maximum=8)] = 4
    gptq: bool = True  # later weights make up for earlier ones; false: each to its nearest step

    takes = ON_LAYERS | {"start"}
    may_start = True
    over_codes = False
    tuned = False
    makes_weights = True
    colour = COLOURS["in codes"]

    def made_weights(self, ground: Ground) -> Weights:
        from mft_study.compensated import rounded

        return _made(ground, lambda weight, gram: rounded(weight, gram, self.bits, gptq=self.gptq))

    def stored_bytes(self, ground: Ground, model: nn.Module) -> int:
        """Return the bytes of the layers' codes, which replace the start's weights."""
        from mft.importance.importance import linear_modules, matrix_of
        from mft_study.compensated import rounded_bytes

        layers = linear_modules(ground.start, ground.layers).values()
        return sum(rounded_bytes(matrix_of(layer).shape, self.bits) for layer in layers)


def _made(ground: Ground, change: Callable[[Tensor, Tensor], Tensor]) -> Weights:
    from mft.models.linears import weight_name
    from mft_study.compensated import compensate

    model = copy.deepcopy(ground.start).float()  # in bfloat16, a layer's remembered inputs differ by too much
    changed = compensate(model, ground.layers, change, ground.rows(), seed=ground.seed)
    named = {weight_name(ground.start, name): weight.detach() for name, weight in changed.items()}
    return {name: weight.to("cpu", ground.start.get_parameter(name).dtype) for name, weight in named.items()}
