"""masked_linear_grouped from scores alone: the masks of all experts are found when the scores have changed.

As masked_linear_by_ratio in masking.py, for experts.
"""

from torch import Tensor

from ..ops import checks
from ..ops.grouped import GRADIENTS_OF_GROUPED_PACKED, GROUPED_PACKED
from ..ops.grouped_checks import check_grouped
from ..ops.route import Op, is_called_by_graph
from ..reference.fixed_point import selectable
from .masking import by_the_forwards_mask, current_mask, sign_scores


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
    """masked_linear_grouped with the thresholds that keep ``keep_ratio`` of each expert's scores, or one fixed for all.

    Of a masked layer's scores, thresholds and bits are found when they have changed; other forwards and backwards read
    2 bits a weight instead. Of any other tensor's they are found in each. int16 scores (see fixed_point.py) get no
    gradient. Other arguments as of masked_linear_grouped.
    """
    return _BY_RATIO(x, weight, scores, offsets, bias, keep_ratio, threshold, transposed, mode, backend)


def _check(x, weight, scores, offsets, bias, keep_ratio, threshold, transposed, mode, backend):
    checks.check_mode(mode)
    check_grouped(x, weight, offsets, bias, transposed)
    checks.check_scores(selectable(scores), weight)
    checks.check_keep_ratio(keep_ratio)
    checks.check_fixed_threshold(threshold)
    return x, weight, scores, offsets, bias, keep_ratio, threshold, transposed, mode, backend


def _product(x, weight, scores, offsets, bias, keep_ratio, threshold, transposed, mode, backend):
    mask = current_mask(scores, keep_ratio, threshold, mode, remember=not is_called_by_graph())
    return GROUPED_PACKED.compute(x, weight, mask.packed, offsets, bias, transposed, backend)


def _gradients(grad_output, x, weight, scores, offsets, keep_ratio, threshold, transposed, mode, *rest):
    mask = current_mask(scores, keep_ratio, threshold, mode, remember=False)
    rule = keep_ratio, threshold, transposed, mode
    return _gradients_of(mask, grad_output, x, weight, scores, offsets, *rule, *rest)


def _gradients_of(mask, grad_output, x, weight, scores, offsets, keep_ratio, threshold, transposed, mode, *rest):
    of_mask = mask.packed, sign_scores(scores), mask.signs
    return GRADIENTS_OF_GROUPED_PACKED.compute(grad_output, x, weight, *of_mask, offsets, transposed, mode, *rest)


_BY_RATIO_BACKWARD = Op("masked_linear_grouped_by_ratio_backward", _gradients, is_gradient=True)
_BY_RATIO = Op(
    "masked_linear_grouped_by_ratio",
    _product,
    check=_check,
    gradient=by_the_forwards_mask(_BY_RATIO_BACKWARD, _gradients_of, bias=4),
    casts=(0, 1, 4),
)
