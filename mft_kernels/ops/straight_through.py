"""The straight-through gradient of the masked products (arXiv 2503.22764), computed by a separate op."""

from typing import Any

from torch import Tensor

from .route import Gradient, Op, unchanged
from .schema import arguments_of, calls


class StraightThrough(Gradient):
    """The gradient of an op with the arguments (x, weight, tensors ..., bias, settings ..., backend).

    Args:
        op: the name of that op. If it has an argument "scores", scores get a gradient.
        backward_op: the op that computes d_x, d_weight, d_scores and d_bias.
    """

    def __init__(self, op: str, backward_op: Op) -> None:
        names = calls[op]._fields
        self._bias = names.index("bias")
        self._scores = names.index("scores") if "scores" in names else None
        saved = ("grad_output", *names[: self._bias], *names[self._bias + 1 :], "output_mask")
        self._backward_op, self._arguments = backward_op, arguments_of(backward_op.name, saved)

    def save(self, ctx: Any, call: Any) -> None:
        x, *tensors = call[: self._bias]
        ctx.settings = call[self._bias + 1 :]
        asked = ctx.needs_input_grad
        reads_x = asked[1] or (self._scores is not None and asked[self._scores])
        ctx.save_for_backward(x if reads_x else None, *tensors)

    def backward(self, ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
        x, *tensors = unchanged(ctx)
        asked, scores = ctx.needs_input_grad, self._scores
        output_mask = [asked[0], asked[1], scores is not None and asked[scores], asked[self._bias]]
        x = grad_output if x is None else x  # a placeholder: x is read only for d_weight and d_scores
        found = self._gradients(ctx, self._arguments((grad_output, x, *tensors, *ctx.settings, output_mask)))
        grads: list[Tensor | None] = [None] * len(asked)
        for at, wanted, grad in zip((0, 1, scores, self._bias), output_mask, found):
            if wanted:
                grads[at] = grad  # type: ignore[index]
        return tuple(grads)

    def _gradients(self, ctx: Any, given: tuple) -> tuple[Tensor, ...]:
        """Compute d_x, d_weight, d_scores and d_bias from the arguments of ``backward_op``."""
        return self._backward_op(*given)
