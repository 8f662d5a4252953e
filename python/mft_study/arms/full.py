"""Arms of the weights themselves: the base model, the full fine-tune where most others start, continued training."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from mft.config import TrainConfig
from mft.files.figure import COLOURS
from mft_study.arms.arm import LEARNING, ON_LAYERS, TRAINING, Arm, Ground
from mft_study.arms.size import NUMBER, model_numbers, trained_weight_bytes
from mft_study.arms.weights import Weights

if TYPE_CHECKING:
    from torch import Tensor, nn


class Base(Arm):
    """The model before the full fine-tune."""

    follows = False
    colour = COLOURS["base"]
    whole_model = True
    may_start = True
    may_teach = True
    tuned = False

    def model(self, ground: Ground, path: Path) -> nn.Module:
        return ground.start

    def stored_bytes(self, ground: Ground, model: nn.Module) -> int:
        return 0


class _AllWeights(Arm):
    takes = TRAINING
    colour = COLOURS["full fine-tune"]
    whole_model = True
    may_start = True
    may_teach = True
    compressible = True

    def untrained(self, ground: Ground) -> nn.Module:
        return copy.deepcopy(ground.start).requires_grad_(True)

    def stored_bytes(self, ground: Ground, model: nn.Module) -> int:
        return NUMBER * model_numbers(model)

    def bytes_of_mean(self, ground: Ground, model: nn.Module, runs: int) -> int:
        return NUMBER * model_numbers(model)


class Full(_AllWeights):
    """The full fine-tune, annealed. Without lrs it is the model as loaded, for a model that needs no fine-tune."""

    follows = False
    makes_weights = True

    def made_weights(self, ground: Ground) -> Weights | None:
        return {}

    def model(self, ground: Ground, path: Path) -> nn.Module:
        return ground.start  # on test, ground.start includes its own file

    def stored_bytes(self, ground: Ground, model: nn.Module) -> int:
        return super().stored_bytes(ground, model) if self.lrs else 0


class Continued(_AllWeights):
    """All weights, trained further."""

    takes = LEARNING
    needs = frozenset({"lrs"})
    learns = "everything"
    over_codes = False
    fades = True
    near = True
    colour = COLOURS["continued"]


class Control(Arm):
    """The masked layers' weights, trained further."""

    takes = LEARNING | ON_LAYERS
    needs = frozenset({"lrs"})
    learns = "weights"
    may_start = True
    may_teach = True
    compressible = True
    over_codes = False
    fades = True
    near = True
    colour = COLOURS["control"]

    def untrained(self, ground: Ground) -> nn.Module:
        from mft.models.causal_lm import clone_with_own_weights

        model = clone_with_own_weights(ground.start, ground.layers)
        for name in ground.weight_names():
            model.get_parameter(name).requires_grad_(True)
        return model

    def training_bytes(self, ground: Ground, train: TrainConfig) -> int:
        return trained_weight_bytes(ground.base, ground.numbers())


class KeptWeights(Control):
    """Of a pruned model: the masked layers' weights that are not 0 at the start, trained further."""

    def untrained(self, ground: Ground) -> nn.Module:
        model = super().untrained(ground)
        for name in ground.weight_names():
            weight = model.get_parameter(name)
            weight.register_hook(partial(_where_not_zero, kept=weight.detach() != 0))
        return model

    def stored_bytes(self, ground: Ground, model: nn.Module) -> int:
        """Return the bytes of the kept weights; the start says which these are."""
        return NUMBER * sum(int(ground.start.get_parameter(name).count_nonzero()) for name in ground.weight_names())


def _where_not_zero(gradient: Tensor, kept: Tensor) -> Tensor:
    return gradient.where(kept, 0)
