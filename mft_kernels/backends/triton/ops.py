"""The triton backend's products and gradients: one or two launches each, by the kind of weight and of mask.

Kernels handle strides, alignment and more than 2^31 elements. Copies are made here only of tensors whose leading axes
no view can merge, and of packed words that are not contiguous.

``choose`` decides between the fused product and a pass into scratch. If a caller asks for this backend by name, it
never takes scratch. Under "auto" it is ``choice.automatic``.
"""

import functools
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import Tensor

from ...codes import Codes
from ...operands import Backward, Experts, Keep, KeepByTask, Sums, Weight, as_rows
from ...reference.linear import Gradients
from ..gradients import by_two_functions
from .arguments import aligned, is_exact, operands
from .backward import both
from .choice import FUSED, SCRATCH, Product
from .grouped import product_of_experts, score_grad_of_experts
from .many import product_by_task
from .plan import Problem, one_launch
from .product import fused_product
from .quantized import product_of_codes
from .score_grad import fill_gradients
from .scratch import product_through_scratch
from .target import Target, target_of

Asked = TypeVar("Asked", Backward, Sums)
Choose = Callable[[Product, Target, Mapping[str, Callable[[int], object]]], str]


def always_fused(product: Product, target: Target, candidates: Mapping[str, Callable[[int], object]]) -> str:
    """Return FUSED for all sizes: a request by name runs these kernels alone."""
    return FUSED


def always_scratch(product: Product, target: Target, candidates: Mapping[str, Callable[[int], object]]) -> str:
    """Return SCRATCH for all sizes: the fused kernels are measured against it."""
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
    """Compute a @ where(keep, weight, 0).T + bias; if transposed, a @ where(keep, weight, 0). See the reference."""
    if isinstance(keep, KeepByTask):
        assert isinstance(weight, Tensor), "a mask per row needs a dense matrix"
        return product_by_task(a, weight, keep, bias, transposed)
    if isinstance(weight, Codes):
        return product_of_codes(a, weight, keep, bias, transposed)
    assert keep is not None, "only quantised weights are multiplied without a mask"
    if isinstance(weight, Experts):
        return product_of_experts(a, weight, keep, bias, transposed)
    keep = Keep(keep.source.contiguous()) if _has_gaps(keep.source) else keep
    return _product(as_rows(a), weight, keep, bias, transposed, choose).view(*a.shape[:-1], weight.shape[transposed])


def gradients(asked: Backward, *, choose: Choose = always_fused) -> Gradients:
    """Return d_x, d_weight, d_scores, d_bias; (0,) for what output_mask leaves out."""
    wants_x, wants_weight, wants_scores, wants_bias = asked.output_mask
    grad, weight, dtype = asked.grad_output, asked.weight, asked.score_dtype
    if wants_x and wants_scores and isinstance(weight, Tensor):
        asked = _with_whole_words(asked)
        sums = _by_rows(Sums(grad, asked.x, weight, asked.sign, None, keep=asked.keep))
        if _is_one_launch(sums, dtype, choose):
            d_scores = weight.new_empty(weight.shape, dtype=dtype)
            d_weight = weight.new_empty(weight.shape) if wants_weight else None
            d_x = both(sums._replace(d_scores=d_scores, d_weight=d_weight)).view(*grad.shape[:-1], weight.shape[1])
            d_bias = sums.grad_output.sum(0) if wants_bias else grad.new_empty(0)
            return d_x, grad.new_empty(0) if d_weight is None else d_weight, d_scores, d_bias
    return by_two_functions(functools.partial(product, choose=choose), score_grad, asked)


def score_grad(sums: Sums) -> None:
    """Compute d_scores = [d_scores +] (grad_output.T @ x) [* weight] [* sign] without a temporary of that size."""
    sums = _with_whole_words(sums)
    if sums.offsets is not None:
        score_grad_of_experts(sums)
    else:
        fill_gradients(_by_rows(sums))


# ---------------------------------------------------------------------------------------------- below: private


def _by_rows(sums: Sums) -> Sums:
    return sums._replace(grad_output=as_rows(sums.grad_output), x=as_rows(sums.x))


def _has_gaps(tensor: Tensor | None) -> bool:
    """Return whether these are words, of a mask or of signs, that are not contiguous. No kernel reads such words."""
    return tensor is not None and tensor.dtype == torch.int32 and not tensor.is_contiguous()


def _with_whole_words(asked: Asked) -> Asked:
    if asked.sign is not None and _has_gaps(asked.sign):
        asked = asked._replace(sign=asked.sign.contiguous())
    if asked.keep is not None and _has_gaps(asked.keep.source):
        asked = asked._replace(keep=Keep(asked.keep.source.contiguous()))
    return asked


def _is_one_launch(sums: Sums, dtype: torch.dtype, choose: Choose) -> bool:
    """Return whether one launch makes d_x and d_scores. The alternative is d_x through scratch, then d_scores.

    dtype: of d_scores.
    """
    grad, x, weight, keep = sums.grad_output, sums.x, sums.weight, sums.keep
    assert weight is not None
    assert keep is not None
    if len(grad) == 0 or weight.numel() == 0:
        return False
    target = target_of(grad.device)
    given = operands(weight, keep, aligned(grad, x, weight, *keep.tiled))
    if not one_launch(Problem(target, len(grad), weight.shape[0], weight.shape[1], given)):
        return False

    def run(tokens: int, fused: bool) -> None:
        g, a = (_tokens_like(t, tokens, t.shape[1]) for t in (grad, x))
        aside = sums._replace(grad_output=g, x=a, d_scores=weight.new_empty(weight.shape, dtype=dtype))
        if fused:
            both(aside)
        else:
            product_through_scratch(g, weight, keep, None, True)
            fill_gradients(aside)

    product = _describe(grad, weight, keep, transposed=True, with_scores=True)
    candidates = {FUSED: lambda tokens: run(tokens, True), SCRATCH: lambda tokens: run(tokens, False)}
    return choose(product, target, candidates) == FUSED


def _product(a: Tensor, weight: Tensor, keep: Keep, bias: Tensor | None, transposed: bool, choose: Choose) -> Tensor:
    """Compute a (M, Q) -> (M, P): a @ Wm.T + bias, or a @ Wm if transposed."""
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
    """Return (tokens, features) to measure with: not zeros, which take less power, and not from the user's RNG."""
    values = torch.arange(tokens * features, device=tensor.device) * 7919 % 257 / 128 - 1
    return values.view(tokens, features).to(tensor.dtype)
