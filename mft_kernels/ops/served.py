"""From an op's operands to the function of the backend that serves them: for use within ops, unchecked."""

import torch
from torch import Tensor

from ..backends.table import choose
from ..operands import Experts, Keep, KeepByTask, Weight, dtypes_of
from ..reference.linear import Gradients

_PLAIN: frozenset[type] = frozenset()


def product(
    op: str,
    a: Tensor,
    weight: Weight,
    keep: Keep | KeepByTask | None,
    bias: Tensor | None,
    backend: str,
    *,
    transposed: bool = False,
) -> Tensor:
    """a @ where(keep, weight, 0).T + bias; transposed: without the .T."""
    dtypes, operands = dtypes_of(a, weight, keep), _operands(weight, keep)
    run = choose("product", a.device, dtypes, backend, op=op, operands=operands)
    return run(a, weight, keep, bias, transposed=transposed)


def gradients(
    op: str,
    grad_output: Tensor,
    x: Tensor,
    weight: Tensor | Experts,
    keep: Keep,
    sign: Tensor | None,
    score_dtype: torch.dtype,
    output_mask: list[bool],
    backend: str,
    *,
    transposed: bool = False,
) -> Gradients:
    """d_x, d_weight, d_scores and d_bias of product; (0,) for what output_mask leaves out."""
    dtypes, operands = dtypes_of(grad_output, weight, keep), _operands(weight, keep)
    run = choose("gradients", grad_output.device, dtypes, backend, op=op, operands=operands)
    return run(grad_output, x, weight, keep, sign, score_dtype, output_mask, transposed=transposed)


def accumulate(
    op: str,
    out: Tensor,
    grad_output: Tensor,
    x: Tensor,
    weight: Tensor | None,
    sign: Tensor | None,
    offsets: Tensor | None,
    backend: str,
) -> None:
    """out += (grad_output.T @ x) [* weight] [* sign], of each expert where there are offsets."""
    operands = _PLAIN if offsets is None else frozenset({Experts})
    run = choose("score_grad", out.device, (x.dtype, out.dtype), backend, op=op, operands=operands)
    run(grad_output, x, weight, sign, out, accumulate=True, offsets=offsets)


def sign_of(scores: Tensor | None, signs: Tensor | None, mode: str) -> Tensor | None:
    """What the sign of d_scores is taken from: bits where there are any, else scores; nothing in mode "value"."""
    if mode == "value":
        return None
    return scores if signs is None else signs


def _operands(weight: Weight, keep: Keep | KeepByTask | None) -> frozenset[type]:
    if isinstance(weight, Tensor) and not isinstance(keep, KeepByTask):
        return _PLAIN
    return frozenset(type(each) for each in (weight, keep) if not isinstance(each, Tensor | Keep | None))
