"""Matrices with NaN behind each row, and every product that reads them."""

from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType

import torch
from torch import Tensor

from mft_kernels import reference
from mft_kernels.by_name import oracle
from mft_kernels.testing import Inputs, integer_inputs

OPERANDS = ("x", "weight", "scores", "bias", "grad_output", "packed", "signs")


def pitched(value: Tensor) -> Tensor:
    """The same elements, each row followed by NaN (by -1 in integers)."""
    columns = 1 if value.dim() == 1 else value.shape[-1]
    memory = value.new_full((*value.shape[: value.dim() - (value.dim() > 1)], columns + 3), -1)
    if value.is_floating_point():
        memory.fill_(torch.nan)
    return (memory[:, 0] if value.dim() == 1 else memory[..., :columns]).copy_(value)


def every_product(by: ModuleType, t: Inputs, strided: tuple[str, ...] = ()) -> Iterator[tuple[str, Tensor]]:
    """(name, result) of the products of ``by`` on small integers, with a pitch in the operands of these names."""
    threshold = torch.tensor(2.0, dtype=t.scores.dtype)
    scores = t.scores.where(t.scores != 0, 1)  # 0 has no sign bit
    operands = vars(t) | {
        "scores": scores,
        "packed": reference.pack_mask(scores, threshold, "magnitude"),
        "signs": reference.pack_signs(scores)[0],
    }
    operands |= {name: pitched(operands[name]) for name in strided}
    x, weight, scores, bias, grad, packed, signs = (operands[name] for name in OPERANDS)
    by_scores, by_bits, gradients = (scores, threshold, "magnitude"), (packed, None, signs, "magnitude"), [True] * 4
    for b in (bias, None):
        yield "masked_linear", by.masked_linear(x, weight, scores, threshold, b, "magnitude")
        yield "masked_linear_packed", by.masked_linear_packed(x, weight, packed, b)
    for op, mask in (("masked_linear_backward", by_scores), ("masked_linear_packed_backward", by_bits)):
        results = getattr(by, op)(grad, x, weight, *mask, gradients)
        yield from ((f"{name} of {op}", got) for name, got in zip(("d_x", "d_weight", "d_scores", "d_bias"), results))
    for op, rest in (
        ("accumulate_score_grad", (weight, scores, None, "magnitude")),
        ("accumulate_score_grad", (weight, None, signs, "magnitude")),
        ("accumulate_product", ()),
    ):
        out = torch.ones(t.weight.shape)
        getattr(by, op)(out, grad, x, *rest)
        yield op, out


def assert_no_pitch_is_read(by: ModuleType, length: int, dtype: torch.dtype, *strided: str) -> None:
    """The products of matrices with a pitch are those of contiguous ones, multiplied in fp32; all axes ``length``."""
    t = integer_inputs(length, length, length, dtype)
    exact = replace(t, **{name: value.float() for name, value in vars(t).items()})
    for (name, got), (_, expected) in zip(every_product(by, t, strided), every_product(oracle, exact)):
        assert torch.equal(got, expected.to(got.dtype)), (name, length, strided)


def assert_rows_are_independent(by: ModuleType, length: int, dtype: torch.dtype) -> None:
    """A token of NaN is NaN in its own row of the result, and one of grad_output in its own row of d_x."""
    t = integer_inputs(length, length, length, dtype)
    token = length // 2
    t.x[token] = t.grad_output[token] = torch.nan
    of_tokens = ("masked_linear", "masked_linear_packed", "d_x of")
    for name, got in every_product(by, t):
        if name.startswith(of_tokens):
            assert got.isnan().any(1).nonzero().tolist() == [[token]], (name, length)
