"""The ops over experts: a mixture's linear layers that lie in one parameter (E, N, K), each with a mask of its own.

Rows lie sorted by expert, and ``offsets`` says where those of each end, as torch's grouped_mm takes them. Some models
store the transposed matrices, (E, K, N): their forward product is the other layout's d_x.
"""

from typing import Any

from torch import Tensor

from ..operands import Experts
from . import served
from .checks import check_device, check_factors, check_floating, check_mode, check_tensor
from .grouped_checks import check_grouped, check_grouped_sums, check_offset_values
from .products import masked_products
from .route import Op


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


# ---------------------------------------------------------------------------------------------- their definition


#: GRADIENTS_OF_GROUPED_PACKED: as GRADIENTS_OF_PACKED.
_GROUPED, GROUPED_PACKED, GRADIENTS_OF_GROUPED_PACKED = masked_products(
    "masked_linear_grouped",
    lambda call: Experts(call.weight, call.offsets),
    check=check_grouped,
    check_values=check_offset_values,
)


def _check_sums(call: Any) -> Any:
    out, weight = call.out, call.weight
    check_mode(call.mask_mode)
    check_grouped_sums(call)
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
