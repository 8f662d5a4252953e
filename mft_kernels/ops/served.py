"""From a call of an op to the function of the backend that serves it: for use within ops, unchecked."""

from typing import Any

import torch
from torch import Tensor

from ..backends.table import choose
from ..operands import Backward, Experts, Keep, KeepByTask, Sums, Weight, dtypes_of
from ..reference.linear import Gradients

_PLAIN: frozenset[type] = frozenset()


def product(call: Any, weight: Weight, keep: Keep | KeepByTask | None) -> Tensor:
    """x @ where(keep, weight, 0).T + bias; transposed: without the .T."""
    return _product(call, call.x, weight, keep, call.transposed)


def d_x(call: Any, weight: Weight, keep: Keep | KeepByTask | None) -> Tensor:
    """grad_output @ where(keep, weight, 0)"""
    return _product(call, call.grad_output, weight, keep, True)


def _product(call: Any, a: Tensor, weight: Weight, keep: Keep | KeepByTask | None, transposed: bool) -> Tensor:
    dtypes, operands = dtypes_of(a, weight, keep), _operands(weight, keep)
    run = choose("product", a.device, dtypes, call.backend, op=type(call).__name__, operands=operands)
    return run(a, weight, keep, call.bias, transposed=transposed)


def gradients(call: Any, weight: Tensor | Experts, keep: Keep) -> Gradients:
    """d_x, d_weight, d_scores and d_bias of product; (0,) for what output_mask leaves out."""
    grad, dtype = call.grad_output, torch.float32 if call.scores is None else call.scores.dtype
    dtypes, operands = dtypes_of(grad, weight, keep), _operands(weight, keep)
    run = choose("gradients", grad.device, dtypes, call.backend, op=type(call).__name__, operands=operands)
    sign = _sign(call.scores, call.signs, call.mode)
    return run(Backward(grad, call.x, weight, keep, sign, dtype, call.output_mask, call.transposed))


def accumulate(call: Any, offsets: Tensor | None) -> None:
    """out += (grad_output.T @ x) [* weight] [* sign], of each expert where there are offsets."""
    out, x, weight = call.out, call.x, call.weight
    operands = _PLAIN if offsets is None else frozenset({Experts})
    op = type(call).__name__
    run = choose("score_grad", out.device, (x.dtype, out.dtype), call.backend, op=op, operands=operands)
    sign = None if weight is None else _sign(call.scores, call.signs, call.mask_mode)
    left, right = (x, call.grad_output) if call.transposed else (call.grad_output, x)  # (grad_output.T @ x).T
    run(Sums(left, right, weight, sign, out, accumulate=True, offsets=offsets))


def _sign(scores: Tensor | None, signs: Tensor | None, mode: str) -> Tensor | None:
    """What the sign of d_scores is taken from: bits where there are any, else scores; nothing in mode "value"."""
    if mode == "value":
        return None
    return scores if signs is None else signs


def _operands(weight: Weight, keep: Keep | KeepByTask | None) -> frozenset[type]:
    if isinstance(weight, Tensor) and not isinstance(keep, KeepByTask):
        return _PLAIN
    return frozenset(type(each) for each in (weight, keep) if not isinstance(each, Tensor | Keep | None))
