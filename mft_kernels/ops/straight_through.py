"""The gradient of the masked products: straight through the comparison (arXiv 2503.22764), by an op of its own."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .route import Gradient, unchanged


def straight_through(
    run: Callable, *, bias: int, scores: int | None = None, arrange: Callable | None = None
) -> Gradient:
    """The Gradient of an op with the arguments (x, weight, tensors ..., bias, settings ..., backend).

    Args:
        run: takes (grad_output, x, weight, tensors ..., settings ..., output_mask, backend), and returns d_x, d_weight,
            d_scores and d_bias.
        bias, scores: their places among the arguments. scores None: no score has a gradient.
        arrange: from tensors and settings to what ``run`` takes for them; None: one after the other.
    """

    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        x, *tensors = inputs[:bias]
        ctx.settings = inputs[bias + 1 :]
        reads_x = ctx.needs_input_grad[1] or (scores is not None and ctx.needs_input_grad[scores])
        ctx.save_for_backward(x if reads_x else None, *tensors)

    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, *tensors = unchanged(ctx)
        *settings, backend = ctx.settings
        places = (0, 1, scores, bias)
        output_mask = [at is not None and ctx.needs_input_grad[at] for at in places]
        x = grad_output if x is None else x  # not read unless d_weight or d_scores is wanted
        rest = (*tensors, *settings) if arrange is None else arrange(tensors, settings)
        found = run(grad_output, x, weight, *rest, output_mask, backend)
        grads: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
        for at, wanted, grad in zip(places, output_mask, found):
            if wanted:
                grads[at] = grad  # type: ignore[index]
        return tuple(grads)

    return Gradient(backward, setup_context)
