"""The ops over experts: a mixture's linear layers that lie in one parameter (E, N, K), each with a mask of its own.

Rows lie sorted by expert, and ``offsets`` says where those of each end, as torch's grouped_mm takes them. Semantics are
those of the ops in ``ops.py``, expert by expert. Some models store the transposed matrices, (E, K, N): their forward
product is the other layout's d_x, so a backend needs one product in two directions and one sum of gradients; see
reference_grouped.py. Each op finds its implementation in ``backends``; nothing here computes.
"""

import torch
from torch import Tensor

from .. import reference
from .._ops import ops
from ..backends.table import choose
from ..reference.fixed_point import selectable
from ..reference.linear import Gradients
from .checks import (
    NonFiniteScores,
    check_device,
    check_floating,
    check_keep_ratio,
    check_mode,
    check_packed,
    check_scores,
    check_tensor,
    check_threshold,
    check_transforms,
    check_whole,
)
from .direct import is_direct, is_direct_but_for_autograd
from .grouped_checks import check_grouped, check_grouped_sums, check_offset_values
from .library import (
    define,
    define_autocast,
    define_autograd,
    define_no_double_backward,
    gradient_shapes,
    increment_version,
    unchanged,
)

# ---------------------------------------------------------------------------------------------- what users call


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
    check_mode(mode)
    check_grouped(x, weight, offsets, bias, transposed)
    check_scores(scores, weight)
    check_threshold(threshold, scores)
    threshold = threshold.to(scores.dtype)
    if is_direct_but_for_autograd(x, weight, scores, threshold, offsets, bias):
        return _differentiable(x, weight, scores, threshold, offsets, bias, transposed, mode, backend)
    check_transforms("masked_linear_grouped", x, weight, scores, bias)
    return ops.masked_linear_grouped(x, weight, scores, threshold, offsets, bias, transposed, mode, backend)


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
    check_grouped(x, weight, offsets, bias, transposed)
    check_packed("packed", packed, weight.shape)
    check_device("packed", packed, "weight", weight)
    if is_direct_but_for_autograd(x, weight, packed, offsets, bias):
        return _differentiable_packed(x, weight, packed, offsets, bias, transposed, backend)
    check_transforms("masked_linear_grouped_packed", x, weight, bias)
    return ops.masked_linear_grouped_packed(x, weight, packed, offsets, bias, transposed, backend)


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
    check_mode(mode)
    check_transforms("accumulate_score_grad_grouped", out, grad_output, x, weight, scores, in_place=True)
    check_grouped_sums(out, grad_output, x, offsets, transposed)
    if weight is None:
        if scores is not None or signs is not None:
            given = "scores" if scores is not None else "signs"
            raise ValueError(f"{given} must be None where weight is (score_step applies sign and weight), got a tensor")
    else:
        check_tensor("weight", weight)
        check_floating("weight", weight)
        if weight.shape != out.shape:
            raise ValueError(f"weight must match out {tuple(out.shape)}, got {tuple(weight.shape)}")
        check_device("weight", weight, "out", out)
        if mode == "magnitude" and scores is None and signs is None:
            raise ValueError('mode "magnitude" needs scores or signs, got neither')
        if scores is not None:
            check_scores(scores, weight)
        if signs is not None:
            check_packed("signs", signs, weight.shape)
            check_device("signs", signs, "weight", weight)
    with torch.no_grad():
        direct = is_direct(out, grad_output, x, offsets, weight, scores, signs)
        run = _accumulate if direct else ops.accumulate_score_grad_grouped
        run(out, grad_output, x, offsets, weight, scores, signs, transposed, mode, backend)
    return out


def kept_thresholds(scores: Tensor, keep_ratio: float, *, mode: str = "magnitude", backend: str = "auto") -> Tensor:
    """kept_threshold of each expert: of scores (E, ...) the thresholds (E,), in the scores' dtype.

    Raises: ValueError if keep_ratio is outside [0, 1], or if scores on the CPU are not all finite; on an accelerator
        the thresholds of experts whose scores are not are NaN.
    """
    check_whole("scores", scores)
    check_mode(mode)
    check_keep_ratio(keep_ratio)
    check_tensor("scores", scores)
    if scores.dim() < 2 or scores.shape[0] == 0:
        raise ValueError(f"scores must be (experts, ...), at least one, got shape {tuple(scores.shape)}")
    keys = selectable(scores.detach())
    check_floating("scores", keys)
    return ops.kept_thresholds(keys, keep_ratio, mode, backend).view(scores.dtype)


# ---------------------------------------------------------------------------------------------- for other ops


def product_of_packed_grouped(
    x: Tensor, weight: Tensor, packed: Tensor, offsets: Tensor, bias: Tensor | None, transposed: bool, backend: str
) -> Tensor:
    """What masked_linear_grouped_packed computes, unchecked and out of the dispatcher's sight: for use within an op."""
    check_offset_values(offsets, len(x))
    run = choose("grouped_product", x.device, (weight.dtype,), backend)
    return run(x, weight, None, None, packed, offsets, bias, "value", transposed)


def gradients_of_packed_grouped(
    grad_output: Tensor,
    x: Tensor,
    weight: Tensor,
    packed: Tensor,
    scores: Tensor | None,
    signs: Tensor | None,
    offsets: Tensor,
    transposed: bool,
    mode: str,
    output_mask: list[bool],
    backend: str,
) -> Gradients:
    """d_x, d_weight, d_scores and d_bias of masked_linear_grouped_packed, for use in a backward pass: unchecked."""
    direct = is_direct(grad_output, x, weight, packed, scores, signs, offsets)
    run = _gradients_of_packed if direct else ops.masked_linear_grouped_packed_backward
    return run(grad_output, x, weight, packed, scores, signs, offsets, transposed, mode, output_mask, backend)


def select_each(scores: Tensor, keep_ratio: float, mode: str) -> tuple[Tensor, Tensor]:
    """(thresholds (E,), packed mask) of scores (E, N, K), floating or int16, as score_step finds them of a matrix.

    An expert whose scores are not finite has the threshold NaN (0x7e00 for int16) and keeps nothing, on a CPU too.
    """
    with torch.no_grad():
        return (_select_each if is_direct(scores) else ops.select_each)(scores, keep_ratio, mode)


# ---------------------------------------------------------------------------------------------- their definition


def _product(x, weight, scores, threshold, offsets, bias, transposed, mode, backend):
    check_offset_values(offsets, len(x))
    run = choose("grouped_product", x.device, (weight.dtype, scores.dtype), backend)
    return run(x, weight, scores, _of_each(threshold, weight), None, offsets, bias, mode, transposed)


def _gradients(grad_output, x, weight, scores, threshold, offsets, transposed, mode, output_mask, backend):
    mask = scores, _of_each(threshold, weight), None
    return _all_gradients(grad_output, x, weight, mask, scores, None, offsets, transposed, mode, output_mask, backend)


def _gradients_of_packed(
    grad_output, x, weight, packed, scores, signs, offsets, transposed, mode, output_mask, backend
):
    mask = None, None, packed
    return _all_gradients(grad_output, x, weight, mask, scores, signs, offsets, transposed, mode, output_mask, backend)


def _all_gradients(grad_output, x, weight, mask, scores, signs, offsets, transposed, mode, output_mask, backend):
    """mask: scores, threshold and bits, of which either the last or the others are None."""
    d_x = d_weight = d_scores = d_bias = None
    if output_mask[0]:
        dtypes = (weight.dtype,) if mask[0] is None else (weight.dtype, mask[0].dtype)
        run = choose("grouped_product", weight.device, dtypes, backend)
        d_x = run(grad_output, weight, *mask, offsets, None, mode, not transposed)
    if output_mask[1]:
        d_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
        _add_up(d_weight, grad_output, x, offsets, None, None, None, transposed, mode, False, backend)
        d_weight.masked_fill_(~_keep(mask, weight.shape, mode), 0)
    if output_mask[2]:
        d_scores = weight.new_empty(weight.shape, dtype=torch.float32 if scores is None else scores.dtype)
        _add_up(d_scores, grad_output, x, offsets, weight, scores, signs, transposed, mode, False, backend)
    if output_mask[3]:
        # Sums over rows alone are sums of products with ones.
        d_bias = grad_output.new_empty(weight.shape[0], grad_output.shape[1], 1)
        ones = grad_output.new_ones(len(grad_output), 1)
        _add_up(d_bias, grad_output, ones, offsets, None, None, None, False, mode, False, backend)
        d_bias = d_bias.squeeze(-1)
    empty = [grad_output.new_empty(0) if g is None else g for g in (d_x, d_weight, d_scores, d_bias)]
    return empty[0], empty[1], empty[2], empty[3]


def _add_up(out, grad_output, x, offsets, weight, scores, signs, transposed, mode, accumulate, backend):
    if transposed:  # (grad_output.T @ x).T
        grad_output, x = x, grad_output
    run = choose("grouped_score_grad", out.device, (x.dtype, out.dtype), backend)
    run(out, grad_output, x, offsets, weight, scores, signs, mode, accumulate)


def _accumulate(out, grad_output, x, offsets, weight, scores, signs, transposed, mode, backend):
    check_offset_values(offsets, len(x))
    _add_up(out, grad_output, x, offsets, weight, scores, signs, transposed, mode, True, backend)
    increment_version(out)


def _of_each(threshold: Tensor, weight: Tensor) -> Tensor:
    return threshold.expand(weight.shape[0]).contiguous()


def _keep(mask, shape, mode) -> Tensor:
    scores, threshold, packed = mask
    if packed is not None:
        return reference.unpack_mask(packed, list(shape))
    return torch.stack([reference.keep_mask(each, t, mode) for each, t in zip(scores, threshold.unbind())])


def _kept_thresholds(scores, keep_ratio, mode, backend):
    found = choose("kept_thresholds", scores.device, (scores.dtype,), backend)(scores, keep_ratio, mode)
    if scores.device.type == "cpu" and found.isnan().any():  # see ops._kept_threshold
        raise NonFiniteScores(scores)
    return found


def _select_each(scores, keep_ratio, mode):
    keys = selectable(scores)
    found = choose("kept_thresholds", keys.device, (keys.dtype,))(keys, keep_ratio, mode)
    rows = found.repeat_interleave(keys.shape[1])
    packed = ops.pack_mask(keys.flatten(0, 1), rows, mode, "auto")
    return found.view(scores.dtype), packed.unflatten(0, keys.shape[:2])


def _fake_selection(scores, keep_ratio, mode):
    experts, rows, columns = scores.shape
    return scores.new_empty(experts), scores.new_empty((experts, rows, -(-columns // 32)), dtype=torch.int32)


def _fake_product(x, weight, transposed):
    return x.new_empty((x.shape[0], weight.shape[2 if transposed else 1]))


def fake_gradients(grad_output, weight, score_dtype, transposed, output_mask):
    """Fakes of (d_x, d_weight, d_scores, d_bias), (0,) where not wanted."""
    x_shape = (grad_output.shape[0], weight.shape[1 if transposed else 2])
    bias_shape = (weight.shape[0], grad_output.shape[1])
    return gradient_shapes(output_mask, grad_output, x_shape, weight, score_dtype, bias_shape)


define(
    "masked_linear_grouped(Tensor x, Tensor weight, Tensor scores, Tensor threshold, Tensor offsets, Tensor? bias, "
    "bool transposed, str mode, str backend) -> Tensor",
    lambda x, weight, scores, threshold, offsets, bias, transposed, mode, backend: _fake_product(x, weight, transposed),
    _product,
)
define(
    "masked_linear_grouped_backward(Tensor grad_output, Tensor x, Tensor weight, Tensor scores, Tensor threshold, "
    "Tensor offsets, bool transposed, str mode, bool[4] output_mask, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    lambda grad_output, x, weight, scores, threshold, offsets, transposed, mode, output_mask, backend: fake_gradients(
        grad_output, weight, scores.dtype, transposed, output_mask
    ),
    _gradients,
)
define(
    "masked_linear_grouped_packed(Tensor x, Tensor weight, Tensor packed, Tensor offsets, Tensor? bias, "
    "bool transposed, str backend) -> Tensor",
    lambda x, weight, packed, offsets, bias, transposed, backend: _fake_product(x, weight, transposed),
    product_of_packed_grouped,
)
define(
    "masked_linear_grouped_packed_backward(Tensor grad_output, Tensor x, Tensor weight, Tensor packed, Tensor? scores, "
    "Tensor? signs, Tensor offsets, bool transposed, str mode, bool[4] output_mask, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    lambda grad_output, x, weight, packed, scores, signs, offsets, transposed, mode, output_mask, backend: (
        fake_gradients(grad_output, weight, torch.float32 if scores is None else scores.dtype, transposed, output_mask)
    ),
    _gradients_of_packed,
)
# "mask_mode": see ops.accumulate_score_grad.
define(
    "accumulate_score_grad_grouped(Tensor(a!) out, Tensor grad_output, Tensor x, Tensor offsets, Tensor? weight, "
    "Tensor? scores, Tensor? signs, bool transposed, str mask_mode, str backend) -> ()",
    lambda *args: None,
    _accumulate,
)
define(
    "kept_thresholds(Tensor scores, float keep_ratio, str mode, str backend) -> Tensor",
    lambda scores, keep_ratio, mode, backend: scores.new_empty(scores.shape[:1]),
    _kept_thresholds,
)
define("select_each(Tensor scores, float keep_ratio, str mode) -> (Tensor, Tensor)", _fake_selection, _select_each)


def _save(ctx, inputs, output):
    x, weight, scores, threshold, offsets, _, *ctx.arguments = inputs
    needs_x = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
    ctx.save_for_backward(x if needs_x else None, weight, scores, threshold, offsets)


def _backward(ctx, grad_output):
    x, weight, scores, threshold, offsets = unchanged(ctx)
    transposed, mode, backend = ctx.arguments
    wants = ctx.needs_input_grad
    output_mask = [wants[0], wants[1], wants[2], wants[5]]
    x = grad_output if x is None else x  # not read unless d_weight or d_scores is wanted
    direct = is_direct(grad_output, x, weight, scores, threshold, offsets)
    run = _gradients if direct else ops.masked_linear_grouped_backward
    grads = run(grad_output, x, weight, scores, threshold, offsets, transposed, mode, output_mask, backend)
    grads = [g if wanted else None for g, wanted in zip(grads, output_mask)]
    return grads[0], grads[1], grads[2], None, None, grads[3], None, None, None


def _save_packed(ctx, inputs, output):
    x, weight, packed, offsets, _, *ctx.arguments = inputs
    ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight, packed, offsets)


def _backward_packed(ctx, grad_output):
    x, weight, packed, offsets = unchanged(ctx)
    transposed, backend = ctx.arguments
    wants = ctx.needs_input_grad
    output_mask = [wants[0], wants[1], False, wants[4]]
    x = grad_output if x is None else x
    d_x, d_weight, _, d_bias = gradients_of_packed_grouped(
        grad_output, x, weight, packed, None, None, offsets, transposed, "value", output_mask, backend
    )
    grads = [g if wanted else None for g, wanted in ((d_x, wants[0]), (d_weight, wants[1]), (d_bias, wants[4]))]
    return grads[0], grads[1], None, None, grads[2], None, None


_differentiable = define_autograd("masked_linear_grouped", _product, _save, _backward)
_differentiable_packed = define_autograd(
    "masked_linear_grouped_packed", product_of_packed_grouped, _save_packed, _backward_packed
)
define_no_double_backward("masked_linear_grouped_backward")
define_no_double_backward("masked_linear_grouped_packed_backward")
define_autocast("masked_linear_grouped", casts=(0, 1, 5))
define_autocast("masked_linear_grouped_packed", casts=(0, 1, 4))
