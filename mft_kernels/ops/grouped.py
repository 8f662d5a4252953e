"""The ops over experts: a mixture's linear layers that lie in one parameter (E, N, K), each with a mask of its own.

Rows lie sorted by expert, and ``offsets`` says where those of each end, as torch's grouped_mm takes them. Some models
store the transposed matrices, (E, K, N): their forward product is the other layout's d_x.
"""

import torch
from torch import Tensor

from ..operands import Experts, Keep
from . import served
from .checks import check_device, check_floating, check_mode, check_packed, check_scores, check_tensor, check_threshold
from .grouped_checks import check_grouped, check_grouped_sums, check_offset_values
from .linear import check_factors
from .route import Op
from .served import sign_of
from .straight_through import straight_through


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
    """masked_linear of each expert on its own rows: y[i] = x[i] @ where(keep[e], weight[e], 0).T + bias[e].

    The rows of expert e are those from offsets[e - 1] (0 for the first) up to offsets[e], as torch's grouped_mm takes
    them; none is fine. Rows past the last offset are nobody's: their y and d_x are 0.

    Args:
        x: (T, K), sorted by expert, floating.
        weight: (E, N, K), dtype of x.
        scores: of weight's shape, fp32 or a 16-bit float.
        threshold: () for all experts, or (E,); see kept_thresholds.
        offsets: int32 (E,), rising to at most T. On an accelerator, which would have to be waited for, others are no
            error: which rows they mean is not said, but nothing outside of them is read or written.
        bias: (E, N), dtype of x.
        transposed: weight and scores are (E, K, N), and y is x @ where(keep, weight, 0), without the .T.
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
    """masked_linear_grouped with the masks given as bits (see pack_mask).

    Gradients go to x, weight and bias; no score is involved.

    Args: as of masked_linear_grouped; packed: int32 (E, N, ceil(K / 32)), transposed (E, K, ceil(N / 32)).
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
    """accumulate_score_grad of each expert from its own rows, in place; that of an expert without rows is not touched.

    Args:
        out: (E, N, K), transposed (E, K, N): fp32 or a 16-bit float, contiguous.
        grad_output: (T, N); x: (T, K), of one dtype; offsets: int32 (E,), see masked_linear_grouped.
        weight: of out's shape, or None; then scores and signs must be None too, whatever the mode.
        scores: of out's shape, for the sign in mode "magnitude"; or signs: its bits (see pack_mask), valid when no
            score is exactly 0.
    Returns: out.
    """
    _ACCUMULATE(out, grad_output, x, offsets, weight, scores, signs, transposed, mode, backend)
    return out


# ---------------------------------------------------------------------------------------------- from scores


def _check(x, weight, scores, threshold, offsets, bias, transposed, mode, backend):
    check_mode(mode)
    check_grouped(x, weight, offsets, bias, transposed)
    check_scores(scores, weight)
    check_threshold(threshold, scores)
    return x, weight, scores, threshold.to(scores.dtype), offsets, bias, transposed, mode, backend


def _keep(scores, threshold, mode) -> Keep:
    return Keep(scores, threshold.expand(scores.shape[0]).contiguous(), mode)


def _product(x, weight, scores, threshold, offsets, bias, transposed, mode, backend):
    check_offset_values(offsets, len(x))
    experts, keep = Experts(weight, offsets), _keep(scores, threshold, mode)
    return served.product("masked_linear_grouped", x, experts, keep, bias, backend, transposed=transposed)


def _gradients(grad_output, x, weight, scores, threshold, offsets, transposed, mode, output_mask, backend):
    op, experts, keep = "masked_linear_grouped_backward", Experts(weight, offsets), _keep(scores, threshold, mode)
    how = scores.dtype, output_mask, backend
    return served.gradients(op, grad_output, x, experts, keep, sign_of(scores, None, mode), *how, transposed=transposed)


_GROUPED_BACKWARD = Op("masked_linear_grouped_backward", _gradients, is_gradient=True)
_GROUPED = Op(
    "masked_linear_grouped",
    _product,
    check=_check,
    gradient=straight_through(_GROUPED_BACKWARD, scores=2, bias=5),
    casts=(0, 1, 5),
)

# ---------------------------------------------------------------------------------------------- from packed masks


def _check_of_packed(x, weight, packed, offsets, bias, transposed, backend):
    check_grouped(x, weight, offsets, bias, transposed)
    check_packed("packed", packed, weight.shape)
    check_device("packed", packed, "weight", weight)
    return x, weight, packed, offsets, bias, transposed, backend


def _product_of_packed(x, weight, packed, offsets, bias, transposed, backend):
    check_offset_values(offsets, len(x))
    op, experts = "masked_linear_grouped_packed", Experts(weight, offsets)
    return served.product(op, x, experts, Keep(packed), bias, backend, transposed=transposed)


def _gradients_of_packed(
    grad_output, x, weight, packed, scores, signs, offsets, transposed, mode, output_mask, backend
):
    op, experts, sign = "masked_linear_grouped_packed_backward", Experts(weight, offsets), sign_of(scores, signs, mode)
    how = torch.float32 if scores is None else scores.dtype, output_mask, backend
    return served.gradients(op, grad_output, x, experts, Keep(packed), sign, *how, transposed=transposed)


def _arranged(tensors, settings):
    packed, offsets = tensors
    return packed, None, None, offsets, *settings, "value"


#: d_x, d_weight, d_scores and d_bias of masked_linear_grouped_packed, from the arguments of its schema.
GRADIENTS_OF_GROUPED_PACKED = Op("masked_linear_grouped_packed_backward", _gradients_of_packed, is_gradient=True)
GROUPED_PACKED = Op(
    "masked_linear_grouped_packed",
    _product_of_packed,
    check=_check_of_packed,
    gradient=straight_through(GRADIENTS_OF_GROUPED_PACKED, bias=4, arrange=_arranged),
    casts=(0, 1, 4),
)

# ---------------------------------------------------------------------------------------------- sums


def _check_sums(out, grad_output, x, offsets, weight, scores, signs, transposed, mode, backend):
    check_mode(mode)
    check_grouped_sums(out, grad_output, x, offsets, transposed)
    if weight is not None:
        check_tensor("weight", weight)
        check_floating("weight", weight)
        if weight.shape != out.shape:
            raise ValueError(f"weight must match out {tuple(out.shape)}, got {tuple(weight.shape)}")
        check_device("weight", weight, "out", out)
    check_factors(weight, scores, signs, mode)
    return out, grad_output, x, offsets, weight, scores, signs, transposed, mode, backend


def _accumulate(out, grad_output, x, offsets, weight, scores, signs, transposed, mode, backend):
    check_offset_values(offsets, len(x))
    left, right = (x, grad_output) if transposed else (grad_output, x)  # (grad_output.T @ x).T
    sign = None if weight is None else sign_of(scores, signs, mode)
    served.accumulate("accumulate_score_grad_grouped", out, left, right, weight, sign, offsets, backend)


_ACCUMULATE = Op("accumulate_score_grad_grouped", _accumulate, check=_check_sums, writes=(0,))
