"""mft.in_place: for a custom training loop; the masked layers are ordinary ones until the loop ends."""

from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from mft.checks import check_rule
from mft.engines.in_place_engine import InPlaceStates
from mft.engines.mode import place
from mft.engines.score_states import score_groups
from mft.masks.budget import budget_of
from mft.masks.convert import masked_modules
from mft.masks.in_place.model import masks_in_place
from mft.masks.surrogate import surrogate_of
from mft.models.parallel import unwrapped
from mft_kernels import MaskAdamW


class InPlaceAdamW(MaskAdamW):
    """MaskAdamW over the scores of a masked model whose masks are in place until close(); see in_place.

    The scores learn from the gradients of the model's weights, which zero_grad() sets to None.
    """

    def __init__(self, model: nn.Module, max_grad_norm: float | None = None, **options: Any) -> None:
        model = unwrapped(model)
        if surrogate_of(model) is not None:
            raise ValueError(
                "mask.sharpness must be null in your own training loop, which uses the straight-through gradient: "
                "call mft.train_masks(model, rows, train, way='in_place')"
            )
        check_rule(max_grad_norm is None or max_grad_norm > 0, "max_grad_norm", "be positive or None", max_grad_norm)
        groups = score_groups(masked_modules(model).values())
        if not groups:
            raise ValueError(
                f"model must have masked layers, got a {type(model).__name__} without: mask_model or load_masks first"
            )
        super().__init__(groups, **options)
        self._budget, self._max_norm = budget_of(model), max_grad_norm
        self._states: InPlaceStates | None = InPlaceStates(place(model, way="in_place"), self)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all scores and select the next masks. Return the result of closure, or None.

        Raises: RuntimeError after close(), if no weight has a gradient, or if a weight was moved; NonFiniteScores,
            which names the layer.
        """
        states, loss = self._open("step"), None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not states.has_gradients():
            raise RuntimeError(
                "step must follow a backward(), got no gradient of any masked layer's weight: call loss.backward() "
                "first, on a loss of this model"
            )
        states.check_there()
        with torch.no_grad():
            states.step(None, self._max_norm)
        states.check()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Set the gradients of the weights to None, whatever set_to_none says."""
        if self._states is not None:
            self._states.zero_grad()

    def grow_budget(self, step: int, steps: int) -> None:
        """Do what mft.grow_budget does on the model, then select the masks again."""
        states = self._open("grow_budget")
        if self._budget is not None:
            self._budget.grow(step, steps)
            states.select()

    def packed_masks(self) -> dict[str, Tensor]:
        """Return the masks that the weights hold, by layer name: int32, in pack_mask's format. Do not write to them."""
        found = self._open("packed_masks").result()
        return {name.removesuffix(".mask"): packed for name, packed in found.items()}

    def close(self) -> None:
        """Restore the masked model: weights bit for bit, scores as learned. It may be called again."""
        if self._states is not None:
            self._states.close()
            self._states = None

    def __enter__(self) -> "InPlaceAdamW":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _open(self, name: str) -> InPlaceStates:
        if self._states is None or not self._states.in_place.is_held:
            raise RuntimeError(
                f"{name} must come before close(), got an optimiser that was closed, or stopped by an interrupt: call "
                "close(), then call mft.in_place(model) again"
            )
        return self._states


def in_place(model: nn.Module, *, max_grad_norm: float | None = None, **options: Any) -> InPlaceAdamW:
    """Replace the masked layers by ordinary ones whose weights hold the mask; return the optimiser of the scores.

        with mft.in_place(model, lr=3e-4) as optimizer:
            for batch in batches:
                model(**batch).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        mft.save_masks(model, "masks")

    Inside, a masked layer is an nn.Linear that holds where(keep, weight, 0) and asks for a gradient, so torch.compile,
    DistributedDataParallel, fused modules and inference engines see a dense model. If experts share one parameter, that
    parameter holds the mask. After the block, also after an exception, the model is the masked one again: the weights
    are restored bit for bit, and the scores are as learned. state_dict() has the whole weights and the scores, inside
    the block too. If an interrupt leaves masks in place, masked models' functions refuse the model, and
    leave_in_place(model) restores it.

    Args:
        model: A model from mask_model or load_masks with weights that are not quantised, on its device. It may be
            wrapped by torch.compile.
        max_grad_norm: Before each step the gradients of all scores together are scaled down to this norm.
        options: lr, betas, eps, weight_decay, moments and seed of MaskAdamW.
    Raises: ValueError if nothing is masked, weights are quantised, or a layer has hooks of its own; RuntimeError if the
        masks are in place already. The model is then unchanged.
    """
    return InPlaceAdamW(model, max_grad_norm, **options)


def leave_in_place(model: nn.Module) -> None:
    """Turn a model back into the masked one if its masks are in place, as the end of mft.in_place's block does.

    Raises: RuntimeError if something has written to the weights; they are restored even then.
    """
    found = masks_in_place(unwrapped(model))
    if found is not None:
        found.close()
