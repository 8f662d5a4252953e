"""The triton backend's ops: functions with the names and arguments of ``reference``, each a launch or two.

Strides, alignment and 2^31 elements are the kernels' business; nothing is copied here but leading axes that no view can
merge. ``choose`` decides between the fused product and a pass into scratch: always FUSED where a caller asked for this
backend by name, ``choice.automatic`` under "auto".
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ...reference.linear import Gradients
from . import planned
from .arguments import Keep, aligned, is_exact, operands
from .backward import both
from .choice import FUSED, SCRATCH, Product, automatic
from .cubins import noting
from .plan import one_launch
from .product import fused_product
from .score_grad import score_grad
from .scratch import product_through_scratch
from .target import Target, target_of

Choose = Callable[[Product, Target, Mapping[str, Callable[[int], object]]], str]


def always_fused(product: Product, target: Target, candidates: Mapping[str, Callable[[int], object]]) -> str:
    """FUSED, whatever the sizes."""
    return FUSED


def always_scratch(product: Product, target: Target, candidates: Mapping[str, Callable[[int], object]]) -> str:
    """SCRATCH, whatever the sizes: what the fused kernels are measured against."""
    return SCRATCH


def masked_linear(
    x: Tensor,
    weight: Tensor,
    scores: Tensor,
    threshold: Tensor,
    bias: Tensor | None,
    mode: str,
    *,
    choose: Choose = always_fused,
) -> Tensor:
    """y = x @ where(keep, weight, 0).T + bias, straight from the scores."""
    return _forward(x, weight, Keep(scores, threshold, mode), bias, choose)


def masked_linear_packed(
    x: Tensor, weight: Tensor, packed: Tensor, bias: Tensor | None, *, choose: Choose = always_fused
) -> Tensor:
    """masked_linear with the mask given as bits, int32 (N, ceil(K / 32))."""
    return _forward(x, weight, Keep(packed.contiguous(), None, "packed"), bias, choose)


def masked_linear_backward(
    grad_output: Tensor,
    x: Tensor,
    weight: Tensor,
    scores: Tensor,
    threshold: Tensor,
    mode: str,
    output_mask: list[bool],
    *,
    choose: Choose = always_fused,
) -> Gradients:
    """d_x, d_weight, d_scores, d_bias; (0,) for what output_mask leaves out."""
    sign = scores if mode == "magnitude" else None
    return _backward(grad_output, x, weight, Keep(scores, threshold, mode), sign, scores.dtype, output_mask, choose)


def masked_linear_packed_backward(
    grad_output: Tensor,
    x: Tensor,
    weight: Tensor,
    packed: Tensor,
    scores: Tensor | None,
    signs: Tensor | None,
    mode: str,
    output_mask: list[bool],
    *,
    choose: Choose = always_fused,
) -> Gradients:
    """Gradients of masked_linear_packed; the sign comes from the bits of ``signs`` where given, else from scores."""
    sign = _sign_source(scores, signs, mode)
    dtype = torch.float32 if scores is None else scores.dtype
    return _backward(
        grad_output, x, weight, Keep(packed.contiguous(), None, "packed"), sign, dtype, output_mask, choose
    )


def accumulate_score_grad(
    out: Tensor, grad_output: Tensor, x: Tensor, weight: Tensor, scores: Tensor | None, signs: Tensor | None, mode: str
) -> None:
    """out += (grad_output.T @ x) * weight [* sign(scores)], in the epilogue; no temporary of that size."""
    _add_sums(out, grad_output, x, weight, _sign_source(scores, signs, mode))


def accumulate_product(out: Tensor, grad_output: Tensor, x: Tensor) -> None:
    """out += grad_output.T @ x, by the same kernel without weight and sign."""
    _add_sums(out, grad_output, x, None, None)


# ---------------------------------------------------------------------------------------------- below: private


def _rows(x: Tensor) -> Tensor:
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def _sign_source(scores: Tensor | None, signs: Tensor | None, mode: str) -> Tensor | None:
    if mode == "value":
        return None
    return scores if signs is None else signs.contiguous()


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
            score_grad(grad, rows, weight, keep, sign, d_scores=d_scores, d_weight=d_weight)
    if d_x is not None:
        d_x = d_x.view(*grad_output.shape[:-1], weight.shape[1])
    return [grad.new_empty(0) if g is None else g for g in (d_x, d_weight, d_scores, None)]


def _add_sums(out: Tensor, grad_output: Tensor, x: Tensor, weight: Tensor | None, sign: Tensor | None) -> None:
    given = (out, grad_output, x, weight, sign, None)
    kind = planned.kind(planned.SUMS, x)
    if not planned.sums(given, kind):
        with noting() as launched:
            score_grad(_rows(grad_output), _rows(x), weight, None, sign, d_scores=out, accumulate=True)
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
            score_grad(g, a, weight, keep, sign, d_scores=d_scores)

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
        mask=keep.kind,
        exact=is_exact(weight),
        aligned=aligned(a, weight, *keep.tiled),
        with_scores=with_scores,
    )


def _tokens_like(tensor: Tensor, tokens: int, features: int) -> Tensor:
    """(tokens, features) to measure with: not zeros, which cost a GPU less power, and nothing from the user's RNG."""
    values = torch.arange(tokens * features, device=tensor.device) * 7919 % 257 / 128 - 1
    return values.view(tokens, features).to(tensor.dtype)
