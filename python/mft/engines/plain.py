"""The memory mode plain: a step by autograd over the model's own forward, then AdamW. Others must equal it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mft.config import TrainConfig
from mft.engines.master_weights import MasterAdamW
from mft.engines.own_forward import OwnForward
from mft.engines.placed import Hook, Placed
from mft.engines.score_states import score_groups, score_optimizer
from mft.engines.step import NonFiniteLoss, States
from mft.masks.budget import budget_of
from mft.masks.surrogate import Surrogate
from mft.models.causal_lm import Run
from mft.number_formats import unless_auto
from mft_kernels import MaskedLayer
from mft_kernels.internal import current_mask


class PlainStates(States):
    """The parameters of a model that require grad; see make_stepper for the optimiser."""

    def __init__(self, model: nn.Module, train: TrainConfig) -> None:
        self._model, self.stepper = model, make_stepper(model, train)
        self.optimizer = self.stepper.optimizer
        self._masked = [module for module in model.modules() if isinstance(module, MaskedLayer)]

    def check_learned(self) -> None:
        """Raise NonFiniteLoss if a trained tensor is not finite. Call before a save: no later loss would show it."""
        for name, tensor in self.learned().items():
            bad = tensor.numel() - int(tensor.isfinite().sum())
            if bad:
                raise NonFiniteLoss(
                    f"{name} must stay finite, got {bad} NaN or Inf after the last step: lower train.lr, or look for "
                    "NaN or Inf in the model's weights"
                )

    def learned(self) -> dict[str, Tensor]:
        """Return the trained tensors by parameter name: fp32 masters of 16-bit weights, else the parameters."""
        masters = {id(p): master for p, master in zip(self.stepper.parameters, self.stepper.masters)}
        return {name: masters[id(p)] for name, p in self._model.named_parameters() if id(p) in masters}

    def result(self) -> dict[str, Tensor]:
        trained = {name: p.detach() for name, p in self._model.named_parameters() if p.requires_grad}
        masked = {n: m for n, m in self._model.named_modules() if isinstance(m, MaskedLayer)}
        for name, module in masked.items():
            if trained.pop(f"{name}.scores", None) is not None:
                trained[f"{name}.mask"] = module.packed_mask()
        return trained

    def packed_masks(self) -> list[Tensor]:
        """See step.States. The masks selected here are reused by the next forward."""
        return [current_mask(m.scores, *m.rule).packed for m in self._masked]

    def refresh(self) -> None:
        self.stepper.copy_masters()
        self.select()

    def select(self) -> None:
        """Select the shared threshold of masks under a budget. Other masks compute theirs in the next forward."""
        budget = budget_of(self._model)
        if budget is not None:
            budget.select(self._masked)


class Plain(OwnForward):
    """Trains the parameters that require grad."""

    states: PlainStates

    def __init__(self, placed: Placed, run: Run, head: nn.Module, train: TrainConfig, hook: Hook = None) -> None:
        super().__init__(placed, run, head)
        self._surrogate, self._hook = placed.surrogate, hook
        self.states = PlainStates(placed.model, train)
        self.states.stepper.__enter__()

    def close(self) -> None:
        self.states.stepper.__exit__()

    def _update(self, lr: float, max_norm: float | None) -> None:
        stepper = self.states.stepper
        self._processes.sum_gradients(stepper.masters)
        if self._surrogate is not None:
            replace_gradients(self.model, stepper, self._surrogate)
        if self._hook is not None:
            self._hook()
        stepper.set_lr(lr)
        if max_norm is not None:
            stepper.clip(max_norm)
        stepper.step()
        self.states.select()


class _ScoreAdamW(MasterAdamW):
    """MaskAdamW over scores, which are their own masters in every dtype."""

    def __init__(self, masked: Sequence[MaskedLayer], train: TrainConfig) -> None:
        self.parameters = self.masters = [module.scores for module in masked]
        self.optimizer = score_optimizer(score_groups(masked), train)


def make_stepper(model: nn.Module, train: TrainConfig) -> MasterAdamW:
    """Make AdamW on fp32 masters of what requires grad, or MaskAdamW for scores if they or the moments are not fp32.

    Raises: ValueError if no parameter requires grad, or if weights are trained with moments that are not float32.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    masked = [m for m in model.modules() if isinstance(m, MaskedLayer) and m.scores.requires_grad]
    moments = unless_auto(train.moments)
    if len(masked) != len(trained) or not masked:
        if moments != "float32":
            raise ValueError(f"train.moments must be float32 if weights are trained, got {moments}")
        return MasterAdamW(trained, train)
    if moments == "float32" and all(module.scores.dtype == torch.float32 for module in masked):
        return MasterAdamW(trained, train)
    return _ScoreAdamW(masked, train)


def replace_gradients(model: nn.Module, stepper: MasterAdamW, surrogate: Surrogate) -> None:
    """Overwrite the straight-through gradients by the surrogate's, in the buffers that the optimiser reads."""
    masters = {id(p): master for p, master in zip(stepper.parameters, stepper.masters)}
    masked: list[Any] = [module for module in model.modules() if isinstance(module, MaskedLayer)]
    for module in masked:
        scores = masters.get(id(module.scores))
        if scores is not None and scores.grad is not None:
            surrogate.replace(scores.grad, scores.detach(), threshold=module.threshold, mode=module.mode)
