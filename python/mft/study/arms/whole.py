"""Arms of all weights: the base model, the full fine-tune where most others begin, and that trained on."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from mft.config import TrainConfig
from mft.study.arms.arm import LEARNING, TRAINING, Arm, Ground
from mft.study.arms.memory import trained_weight_bytes
from mft.study.arms.size import NUMBER, model_numbers
from mft.study.arms.weights import Weights
from mft.training.loop import StepReport, finetune


class Base(Arm):
    """Before the full fine-tune."""

    follows = False
    whole_model = True
    may_start = True
    may_teach = True
    tuned = False

    def model(self, ground: Ground, path: Path) -> nn.Module:
        return ground.start

    def stored_bytes(self, ground: Ground, model: nn.Module) -> int:
        return 0


class _Whole(Arm):
    """All weights are trained."""

    takes = TRAINING
    whole_model = True
    may_start = True
    may_teach = True
    compressible = True

    def train(
        self, model: nn.Module, ground: Ground, rows: Any, train: TrainConfig, **options: Any
    ) -> Sequence[StepReport]:
        return finetune(model, rows, train, **options)

    def stored_bytes(self, ground: Ground, model: nn.Module) -> int:
        return NUMBER * model_numbers(model)

    def bytes_of_mean(self, ground: Ground, model: nn.Module, runs: int) -> int:
        return NUMBER * model_numbers(model)

    def training_bytes(self, ground: Ground, train: TrainConfig) -> int:
        return trained_weight_bytes(ground.base, model_numbers(ground.base))


class Full(_Whole):
    """The full fine-tune, annealed; without lrs, the model as it comes, for one that needs no fine-tune."""

    follows = False

    @property
    def leaves_weights(self) -> bool:
        return True

    def made(self, ground: Ground) -> Weights | None:
        return {}

    def model(self, ground: Ground, path: Path) -> nn.Module:
        return ground.start  # on test its own file leads there

    def stored_bytes(self, ground: Ground, model: nn.Module) -> int:
        return super().stored_bytes(ground, model) if self.lrs else 0


class Continued(_Whole):
    """All weights trained on."""

    takes = LEARNING
    needs = frozenset({"lrs"})
    learns = "everything"
    fades = True
    near = True
    colour = "#56b4e9"

    def why_not_over(self, codes: str, quantization: str, name: str) -> str:
        return exact_weights_rule(self.kind, codes, quantization, name)

    def let_learn(self, model: nn.Module, ground: Ground) -> None:
        model.requires_grad_(True)


def exact_weights_rule(kind: str, codes: str, quantization: str, name: str) -> str:
    """Of an arm called name, which trains the weights themselves."""
    return (
        f"lead to no quantized arm for the kind {kind}, here {codes}: weights in {quantization} do not train; train "
        f"them exactly, and round them in an arm {{kind: quantized, start: {name}, quantization: {quantization}}}"
    )
