"""Run an op's call by the function of the backend that serves it. For use within ops: arguments are not checked."""

from typing import Any

import torch
from torch import Tensor

from ..backends.table import choose
from ..operands import Backward, Experts, Keep, KeepByTask, Sums, Weight, dtypes_of
from ..reference.linear import Gradients

_PLAIN: frozenset[type] = frozenset()


def product(call: Any, weight: Weight, keep: Keep | KeepByTask | None) -> Tensor:
    """Compute x @ where(keep, weight, 0).T + bias, without the .T if transposed."""
    return _product(call, call.x, weight, keep, call.transposed)


def d_x(call: Any, weight: Weight, keep: Keep | KeepByTask | None) -> Tensor:
    """Compute grad_output @ where(keep, weight, 0)."""
    return _product(call, call.grad_output, weight, keep, True)


def _product(call: Any, a: Tensor, weight: Weight, keep: Keep | KeepByTask | None, transposed: bool) -> Tensor:
    dtypes, operands = dtypes_of(a, weight, keep), _operands(weight, keep)
    run = choose("product", a.device, dtypes, call.backend, op=type(call).__name__, operands=operands)
    return run(a, weight, keep, call.bias, transposed=transposed)


def gradients(call: Any, weight: Tensor | Experts, keep: Keep) -> Gradients:
    """Compute d_x, d_weight, d_scores and d_bias of product; those that output_mask leaves out have shape (0,)."""
    grad, dtype = call.grad_output, torch.float32 if call.scores is None else call.scores.dtype
    dtypes, operands = dtypes_of(grad, weight, keep), _operands(weight, keep)
    run = choose("gradients", grad.device, dtypes, call.backend, op=type(call).__name__, operands=operands)
    sign = _sign(call.scores, call.signs, call.mode)
    return run(Backward(grad, call.x, weight, keep, sign, dtype, call.output_mask, call.transposed))


def accumulate(call: Any, offsets: Tensor | None) -> None:
    """Compute out += (grad_output.T @ x) [* weight] [* sign], for each expert if there are offsets."""
    out, x, weight = call.out, call.x, call.weight
    operands = _PLAIN if offsets is None else frozenset({Experts})
    op = type(call).__name__
    run = choose("score_grad", out.device, (x.dtype, out.dtype), call.backend, op=op, operands=operands)
    sign = None if weight is None else _sign(call.scores, call.signs, call.mask_mode)
    left, right = (x, call.grad_output) if call.transposed else (call.grad_output, x)  # (grad_output.T @ x).T
    run(Sums(left, right, weight, sign, out, accumulate=True, offsets=offsets))


def _sign(scores: Tensor | None, signs: Tensor | None, mode: str) -> Tensor | None:
    """Return the source of d_scores' sign: the bits if given, else the scores; None in mode "value"."""
    if mode == "value":
        return None
    return scores if signs is None else signs


def _operands(weight: Weight, keep: Keep | KeepByTask | None) -> frozenset[type]:
    if isinstance(weight, Tensor) and not isinstance(keep, KeepByTask):
        return _PLAIN
    return frozenset(type(each) for each in (weight, keep) if not isinstance(each, Tensor | Keep | None))
