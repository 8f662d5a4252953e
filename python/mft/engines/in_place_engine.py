"""The memory mode in_place: a step by autograd over masked weights, then the optimiser step of the scores.

A weight holds its mask: the model's parameter is where(keep, weight, 0), and the dropped values are stored separately.

forward, backward   the model's own, on dense weights; weight.grad is the sum of grad.T @ x over micro-batches
the step            d_scores = weight.grad * whole weight * sign(scores), MaskAdamW, the next mask
the flips           newly dropped weights are moved out of the parameter; weights that are kept again are restored
"""

import contextlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mft.engines.offload import Mover
from mft.engines.own_forward import OwnForward
from mft.engines.placed import Placed
from mft.engines.score_states import HeldMask, ScoreStates, current_masks
from mft.masks.budget import budget_of
from mft.masks.convert import masked_modules
from mft.masks.in_place.model import MasksInPlace
from mft.models.causal_lm import Run
from mft_kernels import MaskAdamW
from mft_kernels.internal import MaskedInPlace, rows_here


@dataclass(eq=False)
class InPlaceMask(HeldMask):
    """A mask that is applied to its layer's weight in place; its gradient is that weight's gradient.

    held: the weight with its mask and its dropped values. parameter: the parameter whose .grad autograd fills.
    """

    held: MaskedInPlace = field(kw_only=True)
    parameter: nn.Parameter = field(kw_only=True)

    def weight(self) -> Tensor:
        """Return a copy of the whole weight, dropped values included: (N, K), or (E, N, K) for experts."""
        return self.held.whole()

    def take(self, packed: Tensor) -> None:
        self.held.change(packed)
        self.packed = packed


class WeightStates(ScoreStates):
    """Scores that learn from the gradients of weights that hold their masks.

    grad_dtype: the dtype in which micro-batches are summed; None: the weights', summed by autograd. Others: see
    ScoreStates.
    """

    def __init__(
        self, masks: Sequence[InPlaceMask], *args: Any, grad_dtype: torch.dtype | None = None, **options: Any
    ) -> None:
        super().__init__(masks, *args, **options)
        self._in_weights, self._grad_dtype = masks, grad_dtype
        for mask in masks:
            if self.buffer_dtype(mask, grad_dtype) != mask.weight_dtype():
                mask.parameter.register_post_accumulate_grad_hook(_sum_in(mask, grad_dtype))

    def step(self, lr: float | None = None, max_norm: float | None = None) -> None:
        """Take one optimiser step from the weights' gradients (0 for a layer without one), and flip the mask bits."""
        for mask in self._in_weights:
            grad = mask.parameter.grad if mask.grad is None else mask.grad
            mask.grad = self.new_buffer(mask, self._grad_dtype) if grad is None else rows_here(grad).contiguous()
        try:
            self.update(self._in_weights, lr, max_norm)
            self.select()
        finally:
            for mask in self._in_weights:
                mask.grad = None

    def zero_grad(self) -> None:
        """Set the gradient of every weight to None."""
        for mask in self._in_weights:
            mask.grad = mask.parameter.grad = None

    def has_gradients(self) -> bool:
        """Whether any weight has a gradient."""
        return any(mask.parameter.grad is not None for mask in self._in_weights)


class InPlaceStates(WeightStates):
    """Scores whose masks are held in the model's weights from construction until close(), on the model's device.

    Args: optimizer: MaskAdamW over the scores of the masked layers, in their order; masks: those held at first, or None
        for those that the scores select now; copied: see MasksInPlace. Others: see WeightStates.
    Raises: as MasksInPlace.
    """

    def __init__(
        self,
        placed: Placed,
        optimizer: MaskAdamW,
        *,
        masks: Sequence[HeldMask] | None = None,
        copied: Collection[str] | None = None,
        grad_dtype: torch.dtype | None = None,
    ) -> None:
        model = placed.model
        masks = current_masks(masked_modules(model)) if masks is None else masks
        self.in_place = MasksInPlace(model, {mask.name: mask.packed for mask in masks}, copied)
        with contextlib.ExitStack() as undo:
            undo.callback(self.in_place.close)
            self._layers = list(self.in_place.layers)
            of_layers = [
                InPlaceMask(
                    *(mask.name, mask.module, mask.packed, mask.threshold), held=layer.held, parameter=layer.parameter
                )
                for mask, layer in zip(masks, self._layers, strict=True)
            ]
            mover = Mover(self._layers[0].parameter.device, separate=False)
            of_model = (placed.processes, placed.surrogate, budget_of(model))
            super().__init__(of_layers, optimizer, mover, *of_model, grad_dtype=grad_dtype)
            undo.pop_all()

    def check_there(self) -> None:
        """Raise RuntimeError if a parameter no longer uses the memory in which its mask is applied."""
        for layer in self._layers:
            layer.check_there()

    def close(self) -> None:
        """Turn the model back into the masked one, with the scores as learned."""
        self.in_place.close()


class InPlace(OwnForward):
    """Trains only scores (states), in any format, with weights that hold their masks. Others: see OwnForward."""

    states: WeightStates

    def __init__(self, placed: Placed, run: Run, head: nn.Module, states: WeightStates) -> None:
        super().__init__(placed, run, head)
        self.states = states

    def close(self) -> None:
        self.states.close()

    def _update(self, lr: float, max_norm: float | None) -> None:
        self.states.step(lr, max_norm)
        self.states.zero_grad()


def _sum_in(mask: InPlaceMask, dtype: torch.dtype | None) -> Callable[[Tensor], None]:
    """Return a hook that adds each gradient of the weight to mask.grad in dtype, and frees it."""

    def add(parameter: Tensor) -> None:
        grad, parameter.grad = parameter.grad, None
        assert grad is not None, "autograd has just made it"
        mask.grad = grad.to(dtype) if mask.grad is None else mask.grad.add_(grad)

    return add
