"""The masked products from scores and a keep ratio, for a matrix and for experts. masking.py finds the current mask."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..ops import checks
from ..ops.grouped import GROUPED_PACKED, GROUPED_PACKED_BACKWARD
from ..ops.grouped_checks import check_grouped
from ..ops.linear import MASKED_LINEAR_PACKED, MASKED_LINEAR_PACKED_BACKWARD
from ..ops.route import Op, is_called_by_graph, is_seen_by_others
from ..ops.straight_through import StraightThrough
from ..reference.fixed_point import selectable
from .masking import CurrentMask, Rule, current_mask, refreshed_mask, remembered_mask


def masked_linear_by_ratio(
    x: Tensor,
    weight: Tensor,
    scores: Tensor,
    bias: Tensor | None = None,
    *,
    keep_ratio: float,
    threshold: float | None = None,
    mode: str = "magnitude",
    pattern: str = "matrix",
    backend: str = "auto",
) -> Tensor:
    """Compute masked_linear with the threshold that keeps ``keep_ratio`` of the scores, or a fixed one.

    Gradients are those of masked_linear. For a MaskedLinear's scores, threshold and bits are found only when the scores
    have changed. Other forwards and backwards read 2 bits per weight instead. For any other tensor they are found in
    each forward and backward. int16 scores (see fixed_point.py) get no gradient. For pattern see MaskedLinear.
    """
    return _BY_RATIO(x, weight, scores, bias, keep_ratio, threshold, mode, pattern, backend)


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


class ForwardMaskGradient(StraightThrough):
    """Gradients with the mask that the forward pass selected, if it is remembered, or else by the op that selects.

    Args:
        op, backward_op: see StraightThrough.
        gradients: computes what backward_op does, from a call of it and a mask.
    """

    def __init__(self, op: str, backward_op: Op, gradients: Callable) -> None:
        super().__init__(op, backward_op)
        self._gradients_with = gradients

    def save(self, ctx: Any, call: Any) -> None:
        super().save(ctx, call)
        ctx.mask = remembered_mask(call.scores, _rule(call))

    def _gradients(self, ctx: Any, given: tuple) -> tuple[Tensor, ...]:
        # A trace would keep this mask even when the scores change. The op refuses a second derivative.
        if ctx.mask is None or torch.is_grad_enabled() or is_seen_by_others(given[0]):
            return super()._gradients(ctx, given)
        return self._gradients_with(self._backward_op.call_of(given), ctx.mask)


def _check_rule(call: Any) -> Any:
    checks.check_mode(call.mode)
    checks.check_tensor("scores", call.scores)
    checks.check_scores(selectable(call.scores), call.weight)
    checks.check_keep_ratio(call.keep_ratio)
    checks.check_fixed_threshold(call.threshold)
    checks.check_pattern(call.pattern, call.keep_ratio, call.threshold, call.scores.shape)
    return call


def _rule(call: Any) -> Rule:
    return Rule(call.keep_ratio, call.threshold, call.mode, call.pattern)


def _mask(call: Any, *, remember: bool) -> CurrentMask:
    return current_mask(call.scores, *_rule(call), remember=remember)


def _sign(call: Any) -> Tensor | None:
    return call.scores.detach() if call.scores.is_floating_point() else None  # int16 scores have no gradient


def _fast_path(x, weight, scores, bias, *rule):
    """Take the short way of the packed op with the current mask. None for scores that have had none by this rule.

    Only CPUs have a short way. Elsewhere a selection here would be one too many within a CUDA graph.
    """
    mask = refreshed_mask(scores, rule) if scores.is_cpu else None
    return None if mask is None else MASKED_LINEAR_PACKED.by_short_way((x, weight, mask.packed, bias, "auto"))


def _product(call: Any) -> Tensor:
    packed = _mask(call, remember=not is_called_by_graph()).packed
    return MASKED_LINEAR_PACKED.compute((call.x, call.weight, packed, call.bias, call.backend))


def _gradients(call: Any, mask: CurrentMask) -> tuple[Tensor, ...]:
    tensors = call.grad_output, call.x, call.weight, mask.packed, _sign(call), mask.signs
    return MASKED_LINEAR_PACKED_BACKWARD.compute((*tensors, call.mode, call.output_mask, call.backend))


def _product_of_experts(call: Any) -> Tensor:
    packed = _mask(call, remember=not is_called_by_graph()).packed
    tensors = call.x, call.weight, packed, call.offsets, call.bias
    return GROUPED_PACKED.compute((*tensors, call.transposed, call.backend))


def _gradients_of_experts(call: Any, mask: CurrentMask) -> tuple[Tensor, ...]:
    tensors = call.grad_output, call.x, call.weight, mask.packed, _sign(call), mask.signs, call.offsets
    return GROUPED_PACKED_BACKWARD.compute((*tensors, call.transposed, call.mode, call.output_mask, call.backend))


_BY_RATIO_BACKWARD = Op(
    "masked_linear_by_ratio_backward",
    lambda call: _gradients(call, _mask(call, remember=False)),
    is_gradient=True,
)
_BY_RATIO = Op(
    "masked_linear_by_ratio",
    _product,
    check=lambda call: _check_rule(checks.check_linear(call)),
    gradient=ForwardMaskGradient("masked_linear_by_ratio", _BY_RATIO_BACKWARD, _gradients),
    fast_path=_fast_path,
)
_GROUPED_BY_RATIO_BACKWARD = Op(
    "masked_linear_grouped_by_ratio_backward",
    lambda call: _gradients_of_experts(call, _mask(call, remember=False)),
    is_gradient=True,
)
_GROUPED_BY_RATIO = Op(
    "masked_linear_grouped_by_ratio",
    _product_of_experts,
    check=lambda call: _check_rule(check_grouped(call)),
    gradient=ForwardMaskGradient("masked_linear_grouped_by_ratio", _GROUPED_BY_RATIO_BACKWARD, _gradients_of_experts),
)
