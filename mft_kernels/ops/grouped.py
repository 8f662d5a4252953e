"""The ops over experts: a mixture's linear layers in one parameter (E, N, K), each with its own mask.

Rows are sorted by expert, and ``offsets`` says where each expert's rows end, as in torch's grouped_mm. Some models
store the transposed matrices, (E, K, N). Their forward product is the d_x of the other layout.
"""

from typing import Any

from torch import Tensor

from ..operands import Experts
from . import served
from .checks import check_device, check_factors, check_floating, check_mode, check_product, check_tensor
from .grouped_checks import check_grouped, check_offset_values, check_offsets
from .products import check_mask_of_scores, check_mask_of_words, keep_by_scores, keep_by_words
from .route import Op
from .straight_through import StraightThrough


def masked_linear_grouped(
    x: Tensor,
    weight: Tensor,
    scores: Tensor,
    threshold: Tensor,
    offsets: Tensor,
    bias: Tensor | None = None,
    *,
    transposed: bool = False,
    mode: str = "magnitude",
    backend: str = "auto",
) -> Tensor:
    """Compute ``y[i] = x[i] @ where(keep[e], weight[e], 0).T + bias[e]`` for the rows i of each expert e.

    The rows of expert e begin at offsets[e - 1] (0 for the first) and end before offsets[e], as in torch's grouped_mm.
    An expert may have no rows. Rows past the last offset belong to no expert: their y and d_x are 0.

    Args:
        x: (T, K), sorted by expert, floating.
        weight: (E, N, K), dtype of x.
        scores: weight's shape, fp32 or a 16-bit float.
        threshold: () for all experts, or (E,); see kept_thresholds.
        offsets: int32 (E,), never decreasing, at most T. On an accelerator they are not checked, because reading them
            would wait for the device. Wrong offsets select undefined rows, but nothing outside of the rows is read or
            written.
        bias: (E, N), dtype of x.
        transposed: if True, weight and scores are (E, K, N), and y is x @ where(keep, weight, 0), without the .T.
        mode, backend: see masked_linear.
    Returns: (T, N) in x's dtype; accumulated in fp32. Under autocast x, weight and bias are cast, scores never.
    Raises: ValueError for shapes, offsets, devices or mode, TypeError for dtypes, RuntimeError for a backend that
        cannot serve.
    """
    return _GROUPED(x, weight, scores, threshold, offsets, bias, transposed, mode, backend)


def masked_linear_grouped_packed(
    x: Tensor,
    weight: Tensor,
    packed: Tensor,
    offsets: Tensor,
    bias: Tensor | None = None,
    *,
    transposed: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Compute masked_linear_grouped with the masks given as bits (see pack_mask).

    x, weight and bias get gradients; there are no scores.

    Args:
        packed: int32 (E, N, ceil(K / 32)), or (E, K, ceil(N / 32)) if transposed.
        x, weight, offsets, bias, transposed, backend: see masked_linear_grouped.
    """
    return GROUPED_PACKED(x, weight, packed, offsets, bias, transposed, backend)


def accumulate_score_grad_grouped(
    out: Tensor,
    grad_output: Tensor,
    x: Tensor,
    offsets: Tensor,
    weight: Tensor | None = None,
    *,
    scores: Tensor | None = None,
    signs: Tensor | None = None,
    transposed: bool = False,
    mode: str = "magnitude",
    backend: str = "auto",
) -> Tensor:
    """Run accumulate_score_grad for each expert on its own rows, in place.

    The gradient of an expert without rows is not touched.

    Args:
        out: (E, N, K), or (E, K, N) if transposed; fp32 or a 16-bit float, contiguous.
        grad_output: (T, N), dtype of x.
        x: (T, K).
        offsets: int32 (E,), see masked_linear_grouped.
        weight: out's shape, or None. If None, scores and signs must be None too, in either mode.
        scores: out's shape, for the sign in mode "magnitude".
        signs: the bits of the sign (see pack_mask), in place of scores; valid only if no score is exactly 0.
    Returns: out.
    """
    _ACCUMULATE(out, grad_output, x, offsets, weight, scores, signs, transposed, mode, backend)
    return out


# ---------------------------------------------------------------------------------------------- the ops' definitions


def _experts(call: Any) -> Experts:
    """Return the weight operand. The offsets' values are checked within the op, so that compiled code does it too."""
    check_offset_values(call)
    return Experts(call.weight, call.offsets)


_GROUPED_BACKWARD = Op(
    "masked_linear_grouped_backward",
    lambda call: served.gradients(call, _experts(call), keep_by_scores(call)),
    is_gradient=True,
)
_GROUPED = Op(
    "masked_linear_grouped",
    lambda call: served.product(call, _experts(call), keep_by_scores(call)),
    check=lambda call: check_mask_of_scores(check_grouped(call)),
    gradient=StraightThrough("masked_linear_grouped", _GROUPED_BACKWARD),
)
#: Returns d_x, d_weight, d_scores and d_bias.
GROUPED_PACKED_BACKWARD = Op(
    "masked_linear_grouped_packed_backward",
    lambda call: served.gradients(call, _experts(call), keep_by_words(call)),
    is_gradient=True,
)
GROUPED_PACKED = Op(
    "masked_linear_grouped_packed",
    lambda call: served.product(call, _experts(call), keep_by_words(call)),
    check=lambda call: check_mask_of_words(check_grouped(call)),
    gradient=StraightThrough("masked_linear_grouped_packed", GROUPED_PACKED_BACKWARD),
)


def _check_sums(call: Any) -> Any:
    out, weight = call.out, call.weight
    check_mode(call.mask_mode)
    check_product(call, "(E, K, N)" if call.transposed else "(E, N, K)", transposed=call.transposed)
    check_offsets(call.offsets, out.shape[0], call.x)
    if weight is not None:
        check_tensor("weight", weight)
        check_floating("weight", weight)
        if weight.shape != out.shape:
            raise ValueError(f"weight must match out {tuple(out.shape)}, got {tuple(weight.shape)}")
        check_device("weight", weight, "out", out)
    check_factors(call)
    return call


def _accumulate(call: Any) -> None:
    check_offset_values(call)
    served.accumulate(call, call.offsets)


_ACCUMULATE = Op("accumulate_score_grad_grouped", _accumulate, check=_check_sums)
