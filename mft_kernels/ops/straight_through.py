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
        asked = ctx.needs_input_grad
        reads_x = asked[1] or (scores is not None and asked[scores])
        ctx.save_for_backward(x if reads_x else None, *tensors)

    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, *tensors = unchanged(ctx)
        *settings, backend = ctx.settings
        asked = ctx.needs_input_grad
        output_mask = [asked[0], asked[1], scores is not None and asked[scores], asked[bias]]
        x = grad_output if x is None else x  # not read unless d_weight or d_scores is wanted
        rest = (*tensors, *settings) if arrange is None else arrange(tensors, settings)
        found = run(grad_output, x, weight, *rest, output_mask, backend)
        grads: list[Tensor | None] = [None] * len(asked)
        for at, wanted, grad in zip((0, 1, scores, bias), output_mask, found):
            if wanted:
                grads[at] = grad  # type: ignore[index]
        return tuple(grads)

    return Gradient(backward, setup_context)
