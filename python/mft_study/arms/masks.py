"""Masks: MFT, whose scores are trained, and masks that are found in one shot."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

from mft.checks import SHARE, check_rule, one_of
from mft.config import BUDGET, DATA_INITS, HALF, INITS, PATTERNS, MaskConfig, TrainConfig
from mft.files.figure import COLOURS
from mft_study.arms.arm import LEARNING, ON_LAYERS, Arm, Ground
from mft_study.arms.size import score_bytes
from mft_study.arms.weights import Weights

if TYPE_CHECKING:
    from torch import Tensor, nn

    from mft.training.loop import StepReport


@dataclass
class _AnyMask(Arm):
    """A mask on chosen layers."""

    pattern: Annotated[str | None, one_of(PATTERNS)] = None  # where keep_ratios hold; null: the study's mask.pattern

    takes = ON_LAYERS | {"keep_ratios", "start"}
    is_mask = True
    may_start = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pattern is not None:
            check_rule(self.threshold is None, "pattern", "be left out with a threshold", self.pattern)
        if self.pattern in HALF:
            rule = f"be [0.5] or left out with pattern {self.pattern} (or take pattern row)"
            check_rule(self.keep_ratios in ([], [0.5]), "keep_ratios", rule, self.keep_ratios)

    def choices(self, mask: MaskConfig) -> dict[str, list[Any]]:
        found = super().choices(mask)
        if self.threshold is None:
            found["keep_ratio"] = found["keep_ratio"] or [0.5 if self.pattern in HALF else mask.keep_ratio]
        return found

    def mask_config(self, mask: MaskConfig) -> MaskConfig:
        found = super().mask_config(mask)
        if self.pattern is None:
            return found
        return replace(found, pattern=self.pattern, keep_ratio=self.choices(mask)["keep_ratio"][0], budget=None)

    def trained_weights(self, model: nn.Module, ground: Ground) -> Weights:
        """Return the weights with the masks applied."""
        from mft.masks.convert import came_from_conv1d, masked_modules
        from mft.models.linears import weight_name

        weights = {}
        for name, module in masked_modules(model).items():
            kept = module.merged_weight()
            kept = kept.t() if came_from_conv1d(module) else kept
            weights[weight_name(ground.start, name)] = kept.cpu().contiguous()
        return weights

    def stored_bytes(self, ground: Ground, model: nn.Module) -> int:
        return _export_bytes(_kept(ground, model))

    def resident_bytes(self, ground: Ground, model: nn.Module) -> int:
        """Return one bit per weight, in bytes: masks stay packed while a model runs."""
        return math.ceil(ground.numbers() / 8)


@dataclass
class Mask(_AnyMask):
    """A mask whose scores are trained."""

    budget: Annotated[float | None, BUDGET] = None  # replaces keep_ratios: as a run's mask.budget
    budget_ramp: Annotated[float | None, SHARE] = None  # null: the study's mask.budget_ramp
    fill_budget: bool | None = None  # as a run's mask.fill_budget

    takes = _AnyMask.takes | LEARNING | {"init", "mode", "threshold", "sharpness", "deletion_penalty"}
    needs = frozenset({"lrs"})
    learns = "scores"
    is_mft = True
    may_teach = True
    near = True
    colour = COLOURS["mask"]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.budget is not None:
            for name in ("keep_ratios", "threshold", "pattern"):
                check_rule(not getattr(self, name), name, "be left out when budget is set", getattr(self, name))
        else:
            for name in ("budget_ramp", "fill_budget"):
                check_rule(getattr(self, name) is None, name, "be left out without budget", getattr(self, name))

    def choices(self, mask: MaskConfig) -> dict[str, list[Any]]:
        found = super().choices(mask)
        return found if self.budget is None else found | {"keep_ratio": []}

    def mask_config(self, mask: MaskConfig) -> MaskConfig:
        found = super().mask_config(mask)
        if self.budget is None:
            return found
        ramp = found.budget_ramp if self.budget_ramp is None else self.budget_ramp
        own: dict[str, Any] = {"budget": self.budget, "budget_ramp": ramp, "fill_budget": self.fill_budget}
        return replace(found, keep_ratio=None, pattern="matrix", **own)

    def untrained(self, ground: Ground) -> nn.Module:
        from mft.masks.convert import masked_modules

        model = self._masked(ground).requires_grad_(False)
        for module in masked_modules(model).values():
            if module.scores.is_floating_point():  # for other dtypes, training raises with the reason
                module.scores.requires_grad_(True)
        return model

    def _masked(self, ground: Ground) -> nn.Module:
        from mft.importance.initial_scores import initialise_scores, mask_from_data
        from mft.masks.convert import mask_model
        from mft.models.causal_lm import clone_with_own_weights

        model, init = clone_with_own_weights(ground.start), self.init or ground.mask.init
        if init in DATA_INITS:
            return mask_from_data(model, replace(ground.mask, init=init), ground.rows())
        mask_model(model, replace(ground.mask, init=init if init in INITS else "constant"))
        return model if init in INITS else initialise_scores(model, init, ground.rows(), seed=ground.seed)

    def train(
        self, model: nn.Module, ground: Ground, rows: Any, train: TrainConfig, **options: Any
    ) -> Sequence[StepReport]:
        from mft.training.loop import train_masks

        return train_masks(model, rows, train, **options)

    def round_to_codes(self, start: nn.Module, merged: Weights, codes: str) -> Weights:
        """Return merged unchanged: each weight is the start's or 0, and all codes have a 0."""
        return merged

    def bytes_of_mean(self, ground: Ground, model: nn.Module, runs: int) -> int:
        """Return the bytes of how many runs keep each weight, or of the weights themselves if that is less."""
        return min(super().bytes_of_mean(ground, model, runs), _export_bytes(_kept_by_runs(ground, model, runs)))

    def training_bytes(self, ground: Ground, train: TrainConfig) -> int:
        return int(score_bytes(ground.mask, train) * ground.numbers())


@dataclass
class OneShot(_AnyMask):
    """A mask found in one shot (importance.py)."""

    tuned = False
    makes_weights = True

    def made_weights(self, ground: Ground) -> Weights:
        from mft.models.causal_lm import clone_with_own_weights
        from mft_study.one_shot import one_shot_mask

        clone = clone_with_own_weights(ground.start)
        return self.trained_weights(one_shot_mask(clone, ground.mask, self.kind, ground.rows()), ground)


def _export_bytes(masks: Iterable[tuple[Tensor, Tensor]]) -> int:
    """Return the bytes of an export of these masks, each with its weight, in the smaller of two codings."""
    from mft.files.mask_coding import coded_size

    alone = by_weight = 0
    for mask, weight in masks:
        alone += coded_size(mask)
        by_weight += coded_size(mask, weight)
    return min(alone, by_weight)


def _kept(ground: Ground, model: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield for each layer a mask, True where a weight is kept, and the weight."""
    from mft.masks.convert import masked_modules
    from mft.models.linears import weight_name

    masked = masked_modules(model)
    for name in ground.layers:
        if name in masked:
            yield masked[name].mask(), masked[name].weight.detach()
            continue
        weight, start = (each.get_parameter(weight_name(each, name)).detach() for each in (model, ground.start))
        yield weight == start, start


def _kept_by_runs(ground: Ground, model: nn.Module, runs: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield for a mean of masks: where at least 1, 2, ... runs keep a weight, each with the weight, layer by layer."""
    from mft.models.linears import weight_name

    for name in ground.layers:
        weight, start = (each.get_parameter(weight_name(each, name)).detach() for each in (model, ground.start))
        kept = (weight / start * runs).nan_to_num(runs).round()  # a weight that is 0 tells nothing: count it as kept
        yield from ((kept >= count, start) for count in range(1, runs + 1))
