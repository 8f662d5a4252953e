"""Ways of learning tasks one after the other, for weights, adapters and masks."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mft.config import TrainConfig
from mft_study.arms.arm import Arm, Ground
from mft_study.arms.weights import Weights, clone_with_weights


class Learner:
    """A way of learning: it learns one task after the other and has a model for the text of each."""

    def __init__(self, arm: Arm, ground: Ground, train: TrainConfig) -> None:
        self.arm, self.ground, self.train = arm, ground, train

    def learn(self, task: str, rows: Any) -> None:
        raise NotImplementedError

    def model(self, task: str) -> nn.Module:
        """Return the model for text of this task."""
        raise NotImplementedError

    def train_weights(self, start: nn.Module, rows: Any) -> Weights:
        """Return what the arm makes of start, under the ordinary model's names."""
        ground = dataclasses.replace(self.ground, start=start, rows=lambda: rows)
        model = self.arm.untrained(ground)
        self.arm.train(model, ground, rows, self.train)
        return self.arm.merged(ground, self.arm.trained_weights(model, ground))


class OneOnAnother(Learner):
    """Each task begins where the previous one ended; alpha: how far it goes from its start to its end."""

    def __init__(self, *args: Any, alpha: float = 1.0) -> None:
        super().__init__(*args)
        self.alpha, self.now = alpha, self.ground.start

    def learn(self, task: str, rows: Any) -> None:
        ends = self.train_weights(self.now, rows)
        starts = {name: self.now.get_parameter(name).detach() for name in ends}
        self.now = clone_with_weights(
            self.now, {name: starts[name].lerp(end, self.alpha) for name, end in ends.items()}
        )

    def model(self, task: str) -> nn.Module:
        return self.now.eval()


class TrainedOn(Learner):
    """One model whose scores or adapters are trained on from task to task."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.now = self.arm.untrained(self.ground)

    def learn(self, task: str, rows: Any) -> None:
        self.arm.train(self.now, self.ground, rows, self.train)

    def model(self, task: str) -> nn.Module:
        return self.now.eval()


class PerTask(Learner):
    """Each task begins at the base, and its own text uses what it learned."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.ends: dict[str, Weights] = {}

    def learn(self, task: str, rows: Any) -> None:
        self.ends[task] = self.train_weights(self.ground.start, rows)

    def model(self, task: str) -> nn.Module:
        return clone_with_weights(self.ground.start, self.ends.get(task, {})).eval()


class United(PerTask):
    """One model that unites everything learned from the base."""

    def model(self, task: str) -> nn.Module:
        if not self.ends:
            return self.ground.start
        start, ends = self.ground.start, list(self.ends.values())
        united = {name: self.unite(start.get_parameter(name).detach(), [end[name] for end in ends]) for name in ends[0]}
        return clone_with_weights(self.ground.start, united).eval()

    @staticmethod
    def unite(start: Tensor, ends: Sequence[Tensor]) -> Tensor:
        raise NotImplementedError


class MasksUnited(United):
    @staticmethod
    def unite(start: Tensor, ends: Sequence[Tensor]) -> Tensor:
        """A weight stays if every mask keeps it."""
        return torch.where(torch.stack([end == 0 for end in ends]).any(0), 0, start)


class AdaptersAdded(United):
    @staticmethod
    def unite(start: Tensor, ends: Sequence[Tensor]) -> Tensor:
        return start + sum(end - start for end in ends)
