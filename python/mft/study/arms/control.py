"""What masks must beat: the weights of the same layers trained on."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from mft.config import TrainConfig
from mft.models.causal_lm import clone_with_own_weights
from mft.study.arms.arm import LEARNING, ON_LAYERS, Arm, Ground
from mft.study.arms.memory import trained_weight_bytes
from mft.study.arms.whole import exact_weights_rule
from mft.training.loop import StepReport, train_weights


class Control(Arm):
    """The masked layers' weights trained on."""

    takes = LEARNING | ON_LAYERS
    needs = frozenset({"lrs"})
    learns = "weights"
    may_start = True
    may_teach = True
    compressible = True
    fades = True
    near = True
    colour = "#e69f00"
    label_below = True  # it lies close to bitdelta

    def why_not_over(self, codes: str, quantization: str, name: str) -> str:
        return exact_weights_rule(self.kind, codes, quantization, name)

    def untrained(self, ground: Ground) -> nn.Module:
        return clone_with_own_weights(ground.start, ground.layers)

    def let_learn(self, model: nn.Module, ground: Ground) -> None:
        model.requires_grad_(False)
        for name in ground.weight_names():
            model.get_parameter(name).requires_grad_(True)

    def train(
        self, model: nn.Module, ground: Ground, rows: Any, train: TrainConfig, **options: Any
    ) -> Sequence[StepReport]:
        return train_weights(model, ground.layers, rows, train, **options)

    def training_bytes(self, ground: Ground, train: TrainConfig) -> int:
        return trained_weight_bytes(ground.base, ground.numbers())
