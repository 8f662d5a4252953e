"""Adapts our optimisers to the Trainer: AdamW on fp32 masters, or MaskAdamW for scores that are not fp32."""

from collections.abc import Callable
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from mft.config import TrainConfig
from mft.engines.master_weights import MasterAdamW
from mft.training.loop import schedule_factor


class SteppedOptimizer(torch.optim.Optimizer):
    """A torch optimiser around a MasterAdamW, with the learning rate of its param_groups.

    before_update: called when the gradients are complete and not yet clipped or applied.
    """

    def __init__(
        self, stepper: MasterAdamW, train: TrainConfig, before_update: Callable[[], None] | None = None
    ) -> None:
        super().__init__(stepper.parameters, {"lr": train.lr})
        self._stepper, self._max_norm, self._before_update = stepper, train.max_grad_norm, before_update

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        assert closure is None, "the Trainer has no closure"
        if self._before_update is not None:
            self._before_update()
        if self._max_norm is not None:
            self._stepper.clip(self._max_norm)
        self._stepper.set_lr(self.param_groups[0]["lr"])
        self._stepper.step()


def make_scheduler(optimizer: SteppedOptimizer, train: TrainConfig) -> LambdaLR:
    """Return a scheduler with train's learning rate at each of its steps."""
    steps = train.steps_for(None)
    return LambdaLR(optimizer, lambda done: schedule_factor(min(done + 1, steps), steps, train))
