"""masked_linear_grouped from scores alone: the masks of all experts are found when the scores have changed.

As masked_linear_by_ratio in masking.py, for experts.
"""

from torch import Tensor

from .._ops import ops
from ..ops import checks, library
from ..ops.direct import is_direct, is_direct_but_for_autograd
from ..ops.grouped import fake_gradients, gradients_of_packed_grouped, product_of_packed_grouped
from ..ops.grouped_checks import check_grouped
from ..reference.fixed_point import selectable
from .masking import current_mask
from .scores import Scores


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
    checks.check_mode(mode)
    check_grouped(x, weight, offsets, bias, transposed)
    checks.check_scores(selectable(scores), weight)
    checks.check_keep_ratio(keep_ratio)
    checks.check_fixed_threshold(threshold)
    if is_direct_but_for_autograd(x, weight, scores, offsets, bias):
        return _differentiable(x, weight, scores, offsets, bias, keep_ratio, threshold, transposed, mode, backend)
    checks.check_transforms("masked_linear_grouped_by_ratio", x, weight, scores, bias)
    return ops.masked_linear_grouped_by_ratio(
        x, weight, scores, offsets, bias, keep_ratio, threshold, transposed, mode, backend
    )


def _forward(x, weight, scores, offsets, bias, keep_ratio, threshold, transposed, mode, backend):
    mask = current_mask(scores, keep_ratio, threshold, mode)
    return product_of_packed_grouped(x, weight, mask.packed, offsets, bias, transposed, backend)


def _backward(grad_output, x, weight, scores, offsets, keep_ratio, threshold, transposed, mode, output_mask, backend):
    mask = current_mask(scores, keep_ratio, threshold, mode)
    return _backward_of(mask, grad_output, x, weight, scores, offsets, transposed, mode, output_mask, backend)


def _backward_of(mask, grad_output, x, weight, scores, offsets, transposed, mode, output_mask, backend):
    sign = Tensor.detach(scores) if scores.is_floating_point() else None  # int16 scores have no gradient
    return gradients_of_packed_grouped(
        grad_output, x, weight, mask.packed, sign, mask.signs, offsets, transposed, mode, output_mask, backend
    )


library.define(
    "masked_linear_grouped_by_ratio(Tensor x, Tensor weight, Tensor scores, Tensor offsets, Tensor? bias, "
    "float keep_ratio, float? threshold, bool transposed, str mode, str backend) -> Tensor",
    lambda x, weight, scores, offsets, bias, keep_ratio, threshold, transposed, mode, backend: x.new_empty(
        (x.shape[0], weight.shape[2 if transposed else 1])
    ),
    _forward,
)
library.define(
    "masked_linear_grouped_by_ratio_backward(Tensor grad_output, Tensor x, Tensor weight, Tensor scores, "
    "Tensor offsets, float keep_ratio, float? threshold, bool transposed, str mode, bool[4] output_mask, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    lambda grad_output, x, weight, scores, offsets, keep_ratio, threshold, transposed, mode, output_mask, backend: (
        fake_gradients(grad_output, weight, scores.dtype, transposed, output_mask)
    ),
    _backward,
)


def _save(ctx, inputs, output):
    x, weight, scores, offsets, _, *ctx.arguments = inputs
    needs_x = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
    ctx.save_for_backward(x if needs_x else None, weight, scores, offsets)
    memo = scores.memo if type(scores) is Scores else None  # see masking.py
    ctx.mask = None if memo is None else memo.mask


def _differentiate(ctx, grad_output):
    x, weight, scores, offsets = library.unchanged(ctx)
    keep_ratio, threshold, transposed, mode, backend = ctx.arguments
    wants = [ctx.needs_input_grad[i] for i in (0, 1, 2, 4)]
    x = grad_output if x is None else x
    if ctx.mask is not None and is_direct(grad_output):  # see masking.py
        grads = _backward_of(ctx.mask, grad_output, x, weight, scores, offsets, transposed, mode, wants, backend)
    else:
        grads = ops.masked_linear_grouped_by_ratio_backward(
            grad_output, x, weight, scores, offsets, keep_ratio, threshold, transposed, mode, wants, backend
        )
    grads = [g if wanted else None for g, wanted in zip(grads, wants)]
    return *grads[:3], None, grads[3], None, None, None, None, None


_differentiable = library.define_autograd("masked_linear_grouped_by_ratio", _forward, _save, _differentiate)
library.define_no_double_backward("masked_linear_grouped_by_ratio_backward")
library.define_autocast("masked_linear_grouped_by_ratio", casts=(0, 1, 4))
