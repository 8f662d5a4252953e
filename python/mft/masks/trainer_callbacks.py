"""Callbacks for trainers that own the optimiser: one grows a budget, one moves the sharpness of the surrogate gradient.

    Trainer(..., callbacks=[BudgetCallback(), SharpnessCallback()])         # transformers' Trainer, and TRL's

In place of BudgetCallback, any other loop calls grow_budget itself. In PEFT an adapter hooks its scores itself; without
SharpnessCallback its sharpness stays at the start of mask.sharpness. On a model from mask_model SharpnessCallback hooks
the scores while the trainer trains.
"""

from typing import Any

from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback

from mft.masks.budget import grow_budget
from mft.masks.surrogate import hook_scores, surrogate_of
from mft_kernels import MaskedLayer


class BudgetCallback(TrainerCallback):
    """Grows a model's budget over a trainer's steps, and selects the masks after each step; see grow_budget."""

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        grow_budget(model, state.global_step, state.max_steps)

    on_train_begin = on_step_end


class SharpnessCallback(TrainerCallback):
    """Moves the sharpness of a model's masks from its start to its end over a trainer's steps."""

    def __init__(self) -> None:
        self._handles: list[RemovableHandle | None] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if (surrogate := surrogate_of(model)) is not None:
            masked = [module for module in model.modules() if isinstance(module, MaskedLayer)]
            self._handles = [
                hook_scores(m.scores, surrogate, threshold=m.threshold, mode=m.mode)
                for m in masked
                if m.scores.requires_grad
            ]

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        for holder in (model, *getattr(model, "peft_config", {}).values()):
            if (surrogate := surrogate_of(holder)) is not None:
                surrogate.sharpen(state.global_step + 1, state.max_steps)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        for handle in self._handles:
            if handle is not None:
                handle.remove()
        self._handles = []
