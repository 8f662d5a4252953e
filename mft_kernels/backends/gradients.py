"""All gradients of a product, from a backend's two functions "product" and "score_grad"."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..operands import Experts, Keep
from ..reference.functions import kept
from ..reference.linear import Gradients


def by_two_functions(product: Callable, score_grad: Callable) -> Callable:
    """The function "gradients" of a backend that makes no two of them in one launch."""

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
    ) -> Gradients:
        """d_x, d_weight, d_scores and d_bias of product(x, weight, keep, bias, transposed=transposed).

        sign: see score_grad. output_mask: which are wanted; the others are (0,).
        """
        matrices = weight.matrices if isinstance(weight, Experts) else weight
        d_x, d_weight, d_scores, d_bias = (grad_output.new_empty(0) for _ in range(4))
        if output_mask[0]:
            d_x = product(grad_output, weight, keep, None, transposed=not transposed)
        if output_mask[1]:
            d_weight = torch.empty_like(matrices, memory_format=torch.contiguous_format)
        if output_mask[2]:
            d_scores = matrices.new_empty(matrices.shape, dtype=score_dtype)
        if isinstance(weight, Experts):
            of_experts = {"offsets": weight.offsets, "accumulate": False}
            left, right = (x, grad_output) if transposed else (grad_output, x)  # (grad_output.T @ x).T
            if output_mask[1]:
                score_grad(left, right, None, None, d_weight, **of_experts)
                d_weight.masked_fill_(~kept(keep, matrices.shape), 0)
            if output_mask[2]:
                score_grad(left, right, matrices, sign, d_scores, **of_experts)
            if output_mask[3]:  # sums over rows alone are sums of products with ones
                d_bias = grad_output.new_empty(len(matrices), grad_output.shape[1], 1)
                score_grad(grad_output, grad_output.new_ones(len(grad_output), 1), None, None, d_bias, **of_experts)
                d_bias = d_bias.squeeze(-1)
            return d_x, d_weight, d_scores, d_bias
        if output_mask[1] or output_mask[2]:
            wanted = d_scores if output_mask[2] else None
            of_weight = {"d_weight": d_weight, "keep": keep} if output_mask[1] else {}
            score_grad(grad_output, x, weight, sign, wanted, accumulate=False, **of_weight)
        if output_mask[3]:
            d_bias = grad_output.reshape(grad_output.shape[:-1].numel(), grad_output.shape[-1]).sum(0)
        return d_x, d_weight, d_scores, d_bias

    return gradients
