"""A callback that grows a budget and selects the masks, for trainers that own the optimiser.

    Trainer(..., callbacks=[BudgetCallback()])         # transformers' Trainer, and TRL's

Any other loop calls grow_budget itself.
"""

from typing import Any

from transformers import TrainerCallback

from mft.budget.budget import grow_budget


class BudgetCallback(TrainerCallback):
    """Grows a model's budget over a trainer's steps, and selects the masks after each step; see grow_budget."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        grow_budget(model, state.global_step, state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        grow_budget(model, state.global_step, state.max_steps)
