"""Compute all gradients of a product by a backend's two functions "product" and "score_grad"."""

from collections.abc import Callable

import torch

from ..operands import Backward, Experts, Sums, as_rows
from ..reference.functions import kept
from ..reference.linear import Gradients


def by_two_functions(product: Callable, score_grad: Callable, asked: Backward) -> Gradients:
    """Compute "gradients" for a backend that does not compute several of them in one launch."""
    grad, weight = asked.grad_output, asked.weight
    wants_x, wants_weight, wants_scores, wants_bias = asked.output_mask
    matrices = weight.matrices if isinstance(weight, Experts) else weight
    d_x, d_weight, d_scores, d_bias = (grad.new_empty(0) for _ in range(4))
    if wants_x:
        d_x = product(grad, weight, asked.keep, None, transposed=not asked.transposed)
    if wants_weight:
        d_weight = torch.empty_like(matrices, memory_format=torch.contiguous_format)
    if wants_scores:
        d_scores = matrices.new_empty(matrices.shape, dtype=asked.score_dtype)
    if isinstance(weight, Experts):
        offsets = weight.offsets
        left, right = (asked.x, grad) if asked.transposed else (grad, asked.x)  # (grad_output.T @ x).T
        if wants_weight:
            score_grad(Sums(left, right, None, None, d_weight, offsets=offsets))
            d_weight.masked_fill_(~kept(asked.keep, matrices.shape), 0)
        if wants_scores:
            score_grad(Sums(left, right, matrices, asked.sign, d_scores, offsets=offsets))
        if wants_bias:  # a sum over rows is a product with ones
            d_bias = grad.new_empty(len(matrices), grad.shape[1], 1)
            score_grad(Sums(grad, grad.new_ones(len(grad), 1), None, None, d_bias, offsets=offsets))
            d_bias = d_bias.squeeze(-1)
        return d_x, d_weight, d_scores, d_bias
    if wants_weight or wants_scores:
        sums = Sums(grad, asked.x, weight, asked.sign, d_scores if wants_scores else None)
        score_grad(sums._replace(d_weight=d_weight, keep=asked.keep) if wants_weight else sums)
    if wants_bias:
        d_bias = as_rows(grad).sum(0)
    return d_x, d_weight, d_scores, d_bias
