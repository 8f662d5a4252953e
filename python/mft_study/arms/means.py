"""Arms between models: the mean of several runs, and points between a run and its start."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mft.checks import check_rule
from mft_study.arms.arm import Arm, Ground
from mft_study.arms.full import Full
from mft_study.arms.size import NUMBER, model_numbers
from mft_study.arms.weights import clone_with_weights

if TYPE_CHECKING:
    from torch import nn


class Between(Arm):
    """Weights that lie between those of models. Reports compare it with the same kind of arm made from the control."""

    takes = frozenset({"of"})
    needs = frozenset({"of"})
    near = True
    joined = False


class Average(Between):
    """The mean weights of `runs` runs of the arm `of`, from one fine-tune."""

    def __post_init__(self) -> None:
        super().__post_init__()
        rule = "be left out for this kind, because the arm named by `of` chooses its setting"
        check_rule(self.max_bytes is None, "max_bytes", rule, self.max_bytes)

    def may_be_of(self, source: type[Arm]) -> bool:
        return bool(source.learns)

    def why_uncompared(self, control: str) -> str:
        return f"no arm averages {self.runs} runs of {control}, and a single run is no match"

    def model(self, ground: Ground, path: Path) -> nn.Module:
        import torch

        parts = [source.weights(ground) for source in ground.sources]
        mean = {
            name: torch.stack([part[name].double() for part in parts]).mean(0).to(weight.dtype)
            for name, weight in parts[0].items()
        }
        return clone_with_weights(ground.start, mean).eval()

    def stored_bytes(self, ground: Ground, model: nn.Module) -> int:
        return ground.sources[0].arm.bytes_of_mean(ground, model, self.runs)

    def resident_bytes(self, ground: Ground, model: nn.Module) -> int:
        whole = ground.sources[0].arm.whole_model
        return NUMBER * (model_numbers(model) if whole else ground.numbers())


class Interpolated(Between):
    """Start + alpha * (trained - start), where trained are the weights of the arm `of`."""

    takes = Between.takes | {"alphas"}
    needs = Between.needs | {"alphas"}

    def may_be_of(self, source: type[Arm]) -> bool:
        return bool(source.learns) or issubclass(source, Full)

    def why_uncompared(self, control: str) -> str:
        return f"no arm lies between {control} and its start"

    def model(self, ground: Ground, path: Path) -> nn.Module:
        """Return the model; its weights are computed in fp64 and rounded once."""
        alpha = ground.setting.alpha
        assert alpha is not None
        weights = {}
        for name, weight in ground.source.weights(ground).items():
            start = ground.start.get_parameter(name).detach().double().cpu()
            weights[name] = (start + alpha * (weight.double() - start)).to(weight.dtype)
        return clone_with_weights(ground.start, weights).eval()

    def stored_bytes(self, ground: Ground, model: nn.Module) -> int:
        """Return the bytes of alpha and of the run that it is made of."""
        return NUMBER + ground.source.stored_bytes(ground, model)

    def resident_bytes(self, ground: Ground, model: nn.Module) -> int:
        return NUMBER + ground.source.resident_bytes(ground, model)
