"""Masks under a budget where another loop owns the optimiser: a callback that grows the quota, and selects.

    Trainer(..., callbacks=[BudgetCallback()])         # transformers' Trainer, and TRL's

Under PEFT an adapter selects by itself, and drops its whole budget from the first step where no callback moves it.
"""

from typing import Any

from transformers import TrainerCallback

from mft.budget.budget import budget_of
from mft_kernels import MaskedLayer


class BudgetCallback(TrainerCallback):
    """Grows what a model's masks may drop over a trainer's steps, and selects after each one."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        _follow(model, state.global_step, state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        _follow(model, state.global_step, state.max_steps)


def _follow(model: Any, step: int, steps: int) -> None:
    for holder in (model, *getattr(model, "peft_config", {}).values()):
        budget = budget_of(holder)
        if budget is None:
            continue
        budget.grow(step, steps)
        if holder is model:
            budget.select([module for module in model.modules() if isinstance(module, MaskedLayer)])
