"""The masked products from scores and a keep ratio, for a matrix and for experts. masking.py finds the current mask."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..ops import checks
from ..ops.grouped import GRADIENTS_OF_GROUPED_PACKED, GROUPED_PACKED
from ..ops.grouped_checks import check_grouped
from ..ops.linear import GRADIENTS_OF_PACKED, MASKED_LINEAR_PACKED
from ..ops.route import Op, is_called_by_graph, is_seen_by_others
from ..ops.schema import arguments_of, calls
from ..ops.straight_through import StraightThrough
from ..reference.fixed_point import selectable
from .masking import CurrentMask, current_mask, refreshed_mask, remembered_mask


def masked_linear_by_ratio(
    x: Tensor,
    weight: Tensor,
    scores: Tensor,
    bias: Tensor | None = None,
    *,
    keep_ratio: float,
    threshold: float | None = None,
    mode: str = "magnitude",
    backend: str = "auto",
) -> Tensor:
    """Compute masked_linear with the threshold that keeps ``keep_ratio`` of the scores, or a fixed one.

    Gradients are those of masked_linear. For a MaskedLinear's scores, threshold and bits are found only when the scores
    have changed. Other forwards and backwards read 2 bits per weight instead. For any other tensor they are found in
    each forward and backward. int16 scores (see fixed_point.py) get no gradient.
    """
    return _BY_RATIO(x, weight, scores, bias, keep_ratio, threshold, mode, backend)


def masked_linear_grouped_by_ratio(
    x: Tensor,
    weight: Tensor,
    scores: Tensor,
    offsets: Tensor,
    bias: Tensor | None = None,
    *,
    keep_ratio: float,
    threshold: float | None = None,
    transposed: bool = False,
    mode: str = "magnitude",
    backend: str = "auto",
) -> Tensor:
    """Compute masked_linear_grouped with thresholds that keep ``keep_ratio`` of each expert's scores, or a fixed one.

    For scores see masked_linear_by_ratio, for other arguments masked_linear_grouped.
    """
    return _GROUPED_BY_RATIO(x, weight, scores, offsets, bias, keep_ratio, threshold, transposed, mode, backend)


# ---------------------------------------------------------------------------------------------- the ops' definitions


class _ByTheForwardsMask(StraightThrough):
    """Gradients with the mask that the forward pass selected, if it is remembered, or else by the op that selects."""

    def __init__(self, of: str, by: Op, with_mask: Callable) -> None:
        super().__init__(of, by)
        self._with_mask = with_mask

    def save(self, ctx: Any, call: Any) -> None:
        super().save(ctx, call)
        ctx.mask = remembered_mask(call.scores, (call.keep_ratio, call.threshold, call.mode))

    def _gradients(self, ctx: Any, given: tuple) -> tuple[Tensor, ...]:
        # A trace would keep this mask even when the scores change. The op refuses a second derivative.
        if ctx.mask is None or torch.is_grad_enabled() or is_seen_by_others(given[0]):
            return super()._gradients(ctx, given)
        return self._with_mask(self._by.call_of(given), ctx.mask)


def _op(name: str, packed: Op, gradients: Op, check: Callable[[Any], None], fast_path: Callable | None = None) -> Op:
    """Define the op ``name``, which finds the mask and leaves the rest to the ops ``packed`` and ``gradients``."""
    backward = f"{name}_backward"
    of_product = arguments_of(packed.name, (*calls[name]._fields, "packed"))
    given = ("all scores" if field == "scores" else field for field in calls[backward]._fields)
    of_gradients = arguments_of(gradients.name, (*given, "packed", "scores", "signs"))  # "scores": for the sign

    def checked(call: Any) -> Any:
        checks.check_mode(call.mode)
        check(call)
        checks.check_tensor("scores", call.scores)
        checks.check_scores(selectable(call.scores), call.weight)
        checks.check_keep_ratio(call.keep_ratio)
        checks.check_fixed_threshold(call.threshold)
        return call

    def product(call: Any) -> Tensor:
        mask = current_mask(call.scores, call.keep_ratio, call.threshold, call.mode, remember=not is_called_by_graph())
        return packed.compute(of_product((*call, mask.packed)))

    def with_mask(call: Any, mask: CurrentMask) -> tuple[Tensor, ...]:
        sign = call.scores.detach() if call.scores.is_floating_point() else None  # int16 scores have no gradient
        return gradients.compute(of_gradients((*call, mask.packed, sign, mask.signs)))

    def select_again(call: Any) -> tuple[Tensor, ...]:
        return with_mask(call, current_mask(call.scores, call.keep_ratio, call.threshold, call.mode, remember=False))

    gradient = _ByTheForwardsMask(name, Op(backward, select_again, is_gradient=True), with_mask)
    return Op(name, product, check=checked, gradient=gradient, fast_path=fast_path)


def _fast_path(x, weight, scores, bias, *rule):
    """Take the short way of the packed op with the current mask. None for scores that have had none by this rule."""
    mask = refreshed_mask(scores, rule)
    return None if mask is None else MASKED_LINEAR_PACKED.by_short_way((x, weight, mask.packed, bias, "auto"))


_BY_RATIO = _op(
    "masked_linear_by_ratio",
    MASKED_LINEAR_PACKED,
    GRADIENTS_OF_PACKED,
    checks.check_linear,
    fast_path=_fast_path,
)
_GROUPED_BY_RATIO = _op("masked_linear_grouped_by_ratio", GROUPED_PACKED, GRADIENTS_OF_GROUPED_PACKED, check_grouped)
