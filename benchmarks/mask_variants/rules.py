"""What may differ between two ways of training a mask: each rule is one change to the plain recipe.

A rule sees the masked model when it begins, each step's gradients before the update, the scores after it, and the
model when it ends. Rules of one variant run in the order in which they are listed.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from mft.masks.convert import masked_modules
from mft_kernels import MaskedLinear, kept_threshold

SCALE = 0.02  # root mean square of the scores that MaskedLinear begins with
_HARDEST = 4.0  # of sigmoid'(0) = 1 / 4, so that a weight at the threshold keeps its whole gradient


class Rule:
    """Changes nothing; the others override what they change."""

    def begin(self, model: nn.Module, steps: int) -> None:
        """After mask_model, before the first step."""

    def before_update(self, step: int, steps: int) -> None:
        """Gradients are complete; step counts from 1."""

    def after_update(self, step: int, steps: int) -> None:
        """The scores have moved."""

    def end(self) -> None:
        """Before the model is evaluated."""


class _OnModules(Rule):
    """A rule that treats every masked layer alike."""

    def begin(self, model: nn.Module, steps: int) -> None:
        self.modules: list[MaskedLinear] = list(masked_modules(model).values())


class KeepSchedule(_OnModules):
    """keep(step) = final + (1 - final) * (1 - step / (share * steps))^power, then final.

    power 1 is linear, 3 is Zhu & Gupta's (arXiv 1710.01878).
    """

    def __init__(self, final: float, power: float, share: float = 0.7) -> None:
        self.final, self.power, self.share = final, power, share

    def begin(self, model: nn.Module, steps: int) -> None:
        super().begin(model, steps)
        self._set(1.0)

    def after_update(self, step: int, steps: int) -> None:
        left = max(0.0, 1 - step / max(1.0, self.share * steps))
        self._set(self.final + (1 - self.final) * left**self.power)

    def end(self) -> None:
        self._set(self.final)

    def _set(self, keep_ratio: float) -> None:
        for module in self.modules:
            module.keep_ratio = keep_ratio


class GradientWindow(_OnModules):
    """The gradient passes only where ||S| - t| <= width * t: a clipped straight-through estimator."""

    def __init__(self, width: float) -> None:
        self.width = width

    def before_update(self, step: int, steps: int) -> None:
        for module in self.modules:
            threshold = module.current_mask().threshold
            distance = (module.scores.detach().abs() - threshold).abs()
            module.scores.grad.mul_(distance <= self.width * threshold)


class GradientSigmoid(_OnModules):
    """The gradient is scaled by 4 sigmoid'((|S| - t) / (width * t)): largest at the threshold."""

    def __init__(self, width: float) -> None:
        self.width = width

    def before_update(self, step: int, steps: int) -> None:
        for module in self.modules:
            threshold = module.current_mask().threshold
            gate = torch.sigmoid((module.scores.detach().abs() - threshold) / (self.width * threshold))
            module.scores.grad.mul_(_HARDEST * gate * (1 - gate))


class ScoreNoise(_OnModules):
    """Each step decides with S + N(0, deviation * SCALE), falling to 0 like the rate; the scores stay clean."""

    def __init__(self, deviation: float) -> None:
        self.deviation = deviation

    def begin(self, model: nn.Module, steps: int) -> None:
        super().begin(model, steps)
        self.generator = torch.Generator().manual_seed(0)
        self._disturb(1.0)

    def before_update(self, step: int, steps: int) -> None:
        self._restore()

    def after_update(self, step: int, steps: int) -> None:
        if step < steps:
            self._disturb(1 - step / steps)

    @torch.no_grad()
    def _disturb(self, share: float) -> None:
        self.clean = [module.scores.detach().clone() for module in self.modules]
        for module in self.modules:
            noise = torch.empty_like(module.scores).normal_(generator=self.generator)
            module.scores.add_(noise, alpha=share * self.deviation * SCALE)

    @torch.no_grad()
    def _restore(self) -> None:
        for module, clean in zip(self.modules, self.clean, strict=True):
            module.scores.copy_(clean)


class ScoreAverage(_OnModules):
    """The mask that is evaluated comes from an exponential mean of the scores over the last ``share`` of the steps."""

    def __init__(self, share: float) -> None:
        self.share = share

    def begin(self, model: nn.Module, steps: int) -> None:
        super().begin(model, steps)
        self.decay = math.exp(-1 / max(1.0, self.share * steps))
        self.means = [module.scores.detach().clone() for module in self.modules]

    def after_update(self, step: int, steps: int) -> None:
        for mean, module in zip(self.means, self.modules, strict=True):
            mean.lerp_(module.scores.detach(), 1 - self.decay)

    @torch.no_grad()
    def end(self) -> None:
        for mean, module in zip(self.means, self.modules, strict=True):
            module.scores.copy_(mean)


class SlowThreshold(_OnModules):
    """The threshold of the k-th largest score follows with an exponential mean; the kept share floats meanwhile.

    The ordinary threshold of the keep ratio is back when training ends.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay

    def begin(self, model: nn.Module, steps: int) -> None:
        super().begin(model, steps)
        for module in self.modules:
            module.threshold = self._exact(module)

    def after_update(self, step: int, steps: int) -> None:
        for module in self.modules:
            module.threshold = self.decay * module.threshold + (1 - self.decay) * self._exact(module)

    def end(self) -> None:
        for module in self.modules:
            module.threshold = None

    @staticmethod
    def _exact(module: MaskedLinear) -> float:
        return kept_threshold(module.scores.detach(), module.keep_ratio).item()


class FreeThreshold(_OnModules):
    """Scores |W| / rms(W) * SCALE in value mode, threshold so that ``keep_ratio`` is kept at first; then it is fixed.

    keep_ratio 1 begins at the fine-tune itself: a weight is dropped only if its score falls by its own size, and as
    many are dropped as the loss asks for. level: SCALE for every weight alike instead of |W|.
    """

    def __init__(self, *, level: bool = False) -> None:
        self.level = level

    def begin(self, model: nn.Module, steps: int) -> None:
        super().begin(model, steps)
        for module in self.modules:
            with torch.no_grad():
                if self.level:
                    module.scores.fill_(SCALE)
                else:
                    module.reset_scores("magnitude")
            module.mode, module.threshold = "value", 0.0


class PullToStart(_OnModules):
    """S <- S - strength * (S - S0) a step, beside the update: few weights change sides without lasting evidence."""

    def __init__(self, strength: float) -> None:
        self.strength = strength

    def begin(self, model: nn.Module, steps: int) -> None:
        super().begin(model, steps)
        self.start = [module.scores.detach().clone() for module in self.modules]

    @torch.no_grad()
    def after_update(self, step: int, steps: int) -> None:
        for module, start in zip(self.modules, self.start, strict=True):
            module.scores.lerp_(start, self.strength)


class Start(_OnModules):
    """Scores from a function of the masked model, for instance a one-shot importance."""

    def __init__(self, initialise: Callable[[nn.Module], Any]) -> None:
        self.initialise = initialise

    def begin(self, model: nn.Module, steps: int) -> None:
        super().begin(model, steps)
        self.initialise(model)
