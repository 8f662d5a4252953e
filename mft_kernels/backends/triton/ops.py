"""The triton backend's products and gradients: each a launch or two, by the kind of weight and of mask.

Strides, alignment and 2^31 elements are the kernels' business; nothing is copied here but leading axes that no view can
merge. ``choose`` decides between the fused product and a pass into scratch: always FUSED where a caller asked for this
backend by name, ``choice.automatic`` under "auto".
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ...codes import Codes
from ...operands import Experts, Keep, KeepByTask, Weight
from ...reference.linear import Gradients
from ..gradients import by_two_functions
from . import planned
from .arguments import aligned, is_exact, operands
from .backward import both
from .choice import FUSED, SCRATCH, Product, automatic
from .cubins import noting
from .grouped import product_of_experts, score_grad_of_experts
from .many import product_by_task
from .plan import one_launch
from .product import fused_product
from .quantized import product_of_codes
from .score_grad import fill_gradients
from .scratch import product_through_scratch
from .target import Target, target_of

Choose = Callable[[Product, Target, Mapping[str, Callable[[int], object]]], str]


def always_fused(product: Product, target: Target, candidates: Mapping[str, Callable[[int], object]]) -> str:
    """FUSED, whatever the sizes."""
    return FUSED


def always_scratch(product: Product, target: Target, candidates: Mapping[str, Callable[[int], object]]) -> str:
    """SCRATCH, whatever the sizes: what the fused kernels are measured against."""
    return SCRATCH


def product(
    a: Tensor,
    weight: Weight,
    keep: Keep | KeepByTask | None,
    bias: Tensor | None,
    *,
    transposed: bool = False,
    choose: Choose = always_fused,
) -> Tensor:
    """a @ where(keep, weight, 0).T + bias; transposed: a @ where(keep, weight, 0). See the reference."""
    if isinstance(keep, KeepByTask):
        assert isinstance(weight, Tensor), "a mask per row is one on a dense matrix"
        return product_by_task(a, weight, keep, bias, transposed=transposed)
    if isinstance(weight, Codes):
        return product_of_codes(a, weight, keep, bias, transposed=transposed)
    assert keep is not None, "only codes are multiplied without a mask"
    if isinstance(weight, Experts):
        return product_of_experts(a, weight, keep, bias, transposed=transposed)
    if transposed:
        return _backward(a, a, weight, keep, None, torch.float32, [True, False, False, False], choose)[0]
    return _forward(a, weight, _with_whole_words(keep), bias, choose)


def gradients(
    grad_output: Tensor,
    x: Tensor,
    weight: Tensor | Experts,
    keep: Keep,
    sign: Tensor | None,
    score_dtype: torch.dtype,
    output_mask: list[bool],
    *,
    transposed: bool = False,
    choose: Choose = always_fused,
) -> Gradients:
    """d_x, d_weight, d_scores, d_bias; (0,) for what output_mask leaves out."""
    if isinstance(weight, Experts):
        how = (score_dtype, output_mask)
        return _of_experts(grad_output, x, weight, keep, sign, *how, transposed=transposed)
    return _backward(grad_output, x, weight, keep, sign, score_dtype, output_mask, choose)


def score_grad(
    grad_output: Tensor,
    x: Tensor,
    weight: Tensor | None,
    sign: Tensor | None,
    d_scores: Tensor | None,
    *,
    accumulate: bool,
    offsets: Tensor | None = None,
    d_weight: Tensor | None = None,
    keep: Keep | None = None,
) -> None:
    """d_scores = [d_scores +] (grad_output.T @ x) [* weight] [* sign], in the epilogue; no temporary of that size."""
    if offsets is not None:
        assert d_scores is not None
        score_grad_of_experts(grad_output, x, weight, _whole_words(sign), d_scores, offsets, accumulate=accumulate)
    elif accumulate:
        assert d_scores is not None
        _add_sums(d_scores, grad_output, x, weight, _whole_words(sign))
    else:
        of_weight = None if keep is None else _with_whole_words(keep)
        fill_gradients(
            _rows(grad_output), _rows(x), weight, of_weight, _whole_words(sign), d_scores=d_scores, d_weight=d_weight
        )


_of_experts = by_two_functions(product, score_grad)


# ---------------------------------------------------------------------------------------------- below: private


def _rows(x: Tensor) -> Tensor:
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def _whole_words(sign: Tensor | None) -> Tensor | None:
    return sign.contiguous() if sign is not None and sign.dtype == torch.int32 else sign


def _with_whole_words(keep: Keep) -> Keep:
    return keep if keep.words is None else Keep(keep.words.contiguous())


def _forward(x: Tensor, weight: Tensor, keep: Keep, bias: Tensor | None, choose: Choose) -> Tensor:
    given = (x, weight, keep.source, keep.thresholds, bias, None)
    kind = _kind(planned.FORWARD, weight, keep.mode, choose=choose)
    y = planned.forward(given, kind)
    if y is None:
        with noting() as launched:
            y = _product(_rows(x), weight, keep, bias, False, choose).view(*x.shape[:-1], weight.shape[0])
        planned.remember(given, kind, [y], launched)
    return y


def _backward(
    grad_output: Tensor,
    x: Tensor,
    weight: Tensor,
    keep: Keep,
    sign: Tensor | None,
    score_dtype: torch.dtype,
    output_mask: list[bool],
    choose: Choose,
) -> Gradients:
    keep, sign = _with_whole_words(keep), _whole_words(sign)
    reads_x, own_sign = output_mask[1] or output_mask[2], None if sign is keep.source else sign
    given = (grad_output, x if reads_x else None, weight, keep.source, keep.thresholds, own_sign)
    kind = _kind(planned.GRADIENTS, weight, keep.mode, *output_mask[:3], score_dtype, choose=choose)
    grads = planned.gradients(given, kind)
    if grads is None:
        with noting() as launched:
            grads = _gradients(grad_output, x, weight, keep, sign, score_dtype, output_mask, choose)
        planned.remember(given, kind, grads, launched)
    return grads[0], grads[1], grads[2], _rows(grad_output).sum(0) if output_mask[3] else grads[3]


def _gradients(
    grad_output: Tensor,
    x: Tensor,
    weight: Tensor,
    keep: Keep,
    sign: Tensor | None,
    score_dtype: torch.dtype,
    output_mask: list[bool],
    choose: Choose,
) -> list[Tensor]:
    """Those of _backward but d_bias."""
    grad, rows = _rows(grad_output), _rows(x)
    d_x = None
    d_weight = weight.new_empty(weight.shape) if output_mask[1] else None
    d_scores = weight.new_empty(weight.shape, dtype=score_dtype) if output_mask[2] else None
    if output_mask[0] and d_scores is not None and _is_one_launch(grad, rows, weight, keep, sign, score_dtype, choose):
        d_x = both(grad, rows, weight, keep, sign, d_scores, d_weight)
    else:
        if output_mask[0]:
            d_x = _product(grad, weight, keep, None, True, choose)
        if d_scores is not None or d_weight is not None:
            fill_gradients(grad, rows, weight, keep, sign, d_scores=d_scores, d_weight=d_weight)
    if d_x is not None:
        d_x = d_x.view(*grad_output.shape[:-1], weight.shape[1])
    return [grad.new_empty(0) if g is None else g for g in (d_x, d_weight, d_scores, None)]


def _add_sums(out: Tensor, grad_output: Tensor, x: Tensor, weight: Tensor | None, sign: Tensor | None) -> None:
    given = (out, grad_output, x, weight, sign, None)
    kind = planned.kind(planned.SUMS, x)
    if not planned.sums(given, kind):
        with noting() as launched:
            fill_gradients(_rows(grad_output), _rows(x), weight, None, sign, d_scores=out, accumulate=True)
        planned.remember(given, kind, [], launched)


def _kind(what: str, weight: Tensor, *decide: object, choose: Choose) -> int | None:
    """planned.kind, for what is chosen as a user may ask for it."""
    if choose is not automatic and choose is not always_fused:
        return None
    return planned.kind(what, weight, *decide, automatic=choose is automatic)


def _is_one_launch(
    grad: Tensor, x: Tensor, weight: Tensor, keep: Keep, sign: Tensor | None, score_dtype: torch.dtype, choose: Choose
) -> bool:
    """Whether d_x and d_scores come from one launch; the other choice is d_x through scratch, then d_scores."""
    (n, k), m = weight.shape, grad.shape[0]
    if m == 0 or weight.numel() == 0:
        return False
    given = operands(weight, keep, aligned(grad, x, weight, *keep.tiled))
    if not one_launch(target_of(grad.device), m, n, k, given):
        return False

    def run(tokens: int, fused: bool) -> None:
        g, a = _tokens_like(grad, tokens, n), _tokens_like(grad, tokens, k)
        d_scores = weight.new_empty(weight.shape, dtype=score_dtype)
        if fused:
            both(g, a, weight, keep, sign, d_scores, None)
        else:
            product_through_scratch(g, weight, keep, None, True)
            fill_gradients(g, a, weight, keep, sign, d_scores=d_scores)

    product = _describe(grad, weight, keep, transposed=True, with_scores=True)
    candidates = {FUSED: lambda tokens: run(tokens, True), SCRATCH: lambda tokens: run(tokens, False)}
    return choose(product, target_of(grad.device), candidates) == FUSED


def _product(a: Tensor, weight: Tensor, keep: Keep, bias: Tensor | None, transposed: bool, choose: Choose) -> Tensor:
    """a (M, Q) -> (M, P): a @ Wm.T + bias, or a @ Wm if transposed."""
    (n, k), m = weight.shape, a.shape[0]
    p, q = (k, n) if transposed else (n, k)
    if m == 0 or p == 0 or q == 0:
        empty = a.new_zeros((m, p))
        return empty if bias is None else empty.add_(bias)
    runs = {FUSED: fused_product, SCRATCH: product_through_scratch}

    def candidate(name: str) -> Callable[[int], Tensor]:
        return lambda tokens: runs[name](_tokens_like(a, tokens, q), weight, keep, bias, transposed)

    product = _describe(a, weight, keep, transposed=transposed, with_scores=False)
    chosen = choose(product, target_of(a.device), {name: candidate(name) for name in runs})
    return runs[chosen](a, weight, keep, bias, transposed)


def _describe(a: Tensor, weight: Tensor, keep: Keep, *, transposed: bool, with_scores: bool) -> Product:
    return Product(
        m=a.shape[0],
        n=weight.shape[0],
        k=weight.shape[1],
        transposed=transposed,
        dtype=str(weight.dtype),
        mask="packed" if keep.scores is None else str(keep.scores.dtype),
        exact=is_exact(weight),
        aligned=aligned(a, weight, *keep.tiled),
        with_scores=with_scores,
    )


def _tokens_like(tensor: Tensor, tokens: int, features: int) -> Tensor:
    """(tokens, features) to measure with: not zeros, which cost a GPU less power, and nothing from the user's RNG."""
    values = torch.arange(tokens * features, device=tensor.device) * 7919 % 257 / 128 - 1
    return values.view(tokens, features).to(tensor.dtype)
