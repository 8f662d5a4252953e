"""mft.in_place: a loop of one's own over a masked model whose layers are ordinary ones meanwhile."""

from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from mft.budget.budget import budget_of
from mft.checks import check_rule
from mft.engines.in_place import InPlaceStates
from mft.engines.score_states import score_groups
from mft.masks.convert import masked_modules
from mft.models.parallel import unwrapped
from mft.surrogate.surrogate import surrogate_of
from mft_kernels import MaskAdamW


class InPlaceAdamW(MaskAdamW):
    """MaskAdamW over the scores of a masked model whose masks are in place, until close(); see in_place.

    Any scheduler of torch takes it. It trains by the gradients of the model's weights, which zero_grad() forgets.
    """

    def __init__(self, model: nn.Module, max_grad_norm: float | None = None, **options: Any) -> None:
        model = unwrapped(model)
        if surrogate_of(model) is not None:
            raise ValueError(
                "mask.sharpness must be null in a loop of one's own, which learns by the straight-through gradient: "
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
        self._states: InPlaceStates | None = InPlaceStates(model, self)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of all scores, and the next masks. Returns what closure returned, or None.

        Raises: RuntimeError after close(), without a gradient, or where a weight was moved; NonFiniteScores, naming the
            layer.
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
        """The weights have no gradients, not ones of 0 either."""
        if self._states is not None:
            self._states.zero_grad()

    def grow_budget(self, step: int, steps: int) -> None:
        """mft.grow_budget of the model, whose masks then follow."""
        states = self._open("grow_budget")
        if self._budget is not None:
            self._budget.grow(step, steps)
            states.select()

    def packed_masks(self) -> dict[str, Tensor]:
        """The masks that the weights hold, by layer's name: int32, as of pack_mask. Not to be written."""
        found = self._open("packed_masks").result()
        return {name.removesuffix(".mask"): packed for name, packed in found.items()}

    def close(self) -> None:
        """The model is the masked one again, its weights bit for bit what they were, its scores as learned."""
        states, self._states = self._states, None
        if states is not None:
            states.close()

    def __enter__(self) -> "InPlaceAdamW":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _open(self, name: str) -> InPlaceStates:
        if self._states is None:
            raise RuntimeError(
                f"{name} must come before close(), got a closed optimiser: call mft.in_place(model) again"
            )
        return self._states


def in_place(model: nn.Module, *, max_grad_norm: float | None = None, **options: Any) -> InPlaceAdamW:
    """Let the masked layers of model be ordinary ones, with the mask in their weights; returns what trains the scores.

        with mft.in_place(model, lr=3e-4) as optimizer:
            for batch in batches:
                model(**batch).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        mft.save_masks(model, "masks")

    Inside, a masked layer is an nn.Linear that holds where(keep, weight, 0) and asks for a gradient, so torch.compile,
    DistributedDataParallel, fused modules and inference engines see a dense model. Of experts in one parameter that
    parameter is it. After the block, also after an exception, the model is the masked one again: the weights are what
    they were to the bit, the scores what was learned. Inside too, state_dict() has the whole weights and the scores.

    Args:
        model: of mask_model or load_masks, over exact weights, on its device; also in torch.compile.
        max_grad_norm: of all scores' gradients together, to which they are scaled down before each step.
        options: lr, betas, eps, weight_decay, moments and seed of MaskAdamW.
    Raises: ValueError if nothing is masked, weights are quantised, or a layer has hooks of its own; RuntimeError if the
        masks are in place already. The model is then unchanged.
    """
    return InPlaceAdamW(model, max_grad_norm, **options)
