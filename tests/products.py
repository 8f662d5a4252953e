"""Compute every product of a backend in any layout, and compare it bit for bit with the reference on the same operands.

Operands are small integers, so sums are exact in any order: an element that is dropped, taken twice or read from
elsewhere changes the result. The reference always runs on the CPU.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import pytest
import torch
from by_name import oracle
from torch import Tensor

from mft_kernels import reference
from mft_kernels.testing import Inputs, integer_inputs

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MODES = ("magnitude", "value")
GRADIENTS = ("d_x", "d_weight", "d_scores", "d_bias")
ALL = [True, True, True, True]
D_X = [True, False, False, False]
D_SCORES = [False, False, True, False]
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
#: The cards whose tiles and form Triton's products take in the interpreter. On a GPU they take its own.
CARDS = ("INTERPRETER", "A100", "H100", "H100_OLD_TRITON", "B200", "MI300X") if INTERPRETING else ("GPU",)
_USUAL = ("INTERPRETER", "H100", "GPU")  # the smallest tiles, and those of a card


def by_card(prefix: str = "") -> list:
    """Return a parameter for each card: the prefix and its name.

    Cards whose tiles differ only in size are marked slow (make test-slow).
    """
    return [pytest.param(prefix + card, marks=() if card in _USUAL else pytest.mark.slow) for card in CARDS]


@dataclass(frozen=True)
class Operands:
    """x (M, K), weight and scores (N, K), bias (N,), grad_output (M, N), and the same mask as bits (N, K / 32)."""

    x: Tensor
    weight: Tensor
    scores: Tensor
    bias: Tensor
    grad_output: Tensor
    threshold: Tensor
    mode: str
    packed: Tensor
    signs: Tensor

    @classmethod
    def of(cls, t: Inputs, threshold: float | Tensor, mode: str = "magnitude") -> "Operands":
        """Return operands with one threshold, or with one per row."""
        threshold = torch.as_tensor(threshold, dtype=t.scores.dtype)
        packed, signs = reference.pack_mask(t.scores, threshold, mode), reference.pack_signs(t.scores)[0]
        return cls(**vars(t), threshold=threshold, mode=mode, packed=packed, signs=signs)

    def change(self, function: Callable[[Tensor], Tensor], *names: str) -> "Operands":
        """Return operands with ``function`` applied to the tensors of these names; without names, to all."""
        names = names or TENSORS
        return replace(self, **{name: function(getattr(self, name)) for name in names})

    @property
    def forward(self) -> tuple[Any, ...]:
        """Return the arguments of masked_linear."""
        return self.x, self.weight, self.scores, self.threshold, self.bias, self.mode

    def backward(self, output_mask: list[bool]) -> tuple[Any, ...]:
        """Return the arguments of masked_linear_backward."""
        return self.grad_output, self.x, self.weight, self.scores, self.threshold, self.mode, output_mask

    def to(self, device: torch.device) -> "Operands":
        """Return the operands on a device."""
        return self.change(lambda tensor: tensor.to(device))

    def exact(self) -> "Operands":
        """Return the operands in float64, with the same mask."""
        return self.change(Tensor.double, "x", "weight", "bias", "grad_output", "scores", "threshold")


TENSORS = tuple(field.name for field in fields(Operands) if field.name != "mode")


def integers(
    *shape: int,
    dtype: torch.dtype = torch.float16,
    scores_dtype: torch.dtype = torch.float32,
    threshold: float = 2.0,
    mode: str = "magnitude",
    device: torch.device | None = None,
) -> Operands:
    """Return operands of shape (M, N, K), with ties at the threshold and scores of 0."""
    o = Operands.of(integer_inputs(*shape, dtype, scores_dtype, seed=sum(shape)), threshold, mode)
    return o if device is None else o.to(device)


def row_thresholds(t: Inputs | Operands) -> Tensor:
    """Return thresholds that differ from row to row, so that neighbouring rows keep different elements."""
    return (torch.arange(len(t.weight)) % 7 - 3).to(t.scores.dtype)


# ------------------------------------------------------------------------------------------------------------- layouts


def column_major(value: Tensor) -> Tensor:
    return value.T.contiguous().T


def every_second_column(value: Tensor) -> Tensor:
    return torch.stack([value, _not_a_number(value.shape, value)], 2).flatten(1)[:, ::2]


def every_second_row(value: Tensor) -> Tensor:
    return torch.stack([value, _not_a_number(value.shape, value)], 1).flatten(0, 1)[::2]


def misaligned(value: Tensor) -> Tensor:
    """Return a contiguous copy that begins one element behind an aligned address."""
    return _not_a_number((value.numel() + 1,), value)[1:].view_as(value).copy_(value)


def inside_a_larger_one(value: Tensor) -> Tensor:
    """Return a copy within a larger matrix of NaN, at an odd offset and with an odd pitch."""
    rows, columns = value.shape
    return _not_a_number((rows + 2, columns + 5), value)[1:-1, 3:-2].copy_(value)


def pitched(value: Tensor) -> Tensor:
    """Return a copy in which each row, or each element of a vector, is followed by NaN."""
    columns = 1 if value.dim() == 1 else value.shape[-1]
    memory = _not_a_number((*value.shape[: value.dim() - (value.dim() > 1)], columns + 3), value)
    return (memory[:, 0] if value.dim() == 1 else memory[..., :columns]).copy_(value)


def within(value: Tensor, before: int, stride: int) -> Tensor:
    """Return a copy with rows ``stride`` apart, behind ``before`` elements; all memory around it is NaN."""
    rows, columns = value.shape
    memory = _not_a_number((before + (rows + 1) * stride,), value)
    return memory.as_strided((rows, columns), (stride, 1), before).copy_(value)


#: Layouts whose rows are contiguous, then the others.
BY_ROWS = (every_second_row, misaligned, inside_a_larger_one, pitched)
BY_COLUMNS = (column_major, every_second_column)


def _not_a_number(shape: Any, like: Tensor) -> Tensor:
    """Return a tensor filled with NaN; integers are filled with -1, which sets all bits."""
    return like.new_full(shape, torch.nan if like.is_floating_point() else -1)


# ------------------------------------------------------------------------------------------------------------ products


def every_product(by: Any, o: Operands, *, gradients: bool = True) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, result) for each product of ``by``; without ``gradients``, only for the forward pass and d_x."""
    yield "y with bias by scores", by.masked_linear(*o.forward)
    yield "y with bias by bits", by.masked_linear_packed(o.x, o.weight, o.packed, o.bias)
    yield "y by bits", by.masked_linear_packed(o.x, o.weight, o.packed, None)
    given = (o.grad_output, o.x, o.weight)
    by_bits = (*given, o.packed, None, o.signs, o.mode)
    yield "d_x by scores", by.masked_linear_backward(*o.backward(D_X))[0]
    yield "d_x by bits", by.masked_linear_packed_backward(*by_bits, D_X)[0]
    if not gradients:
        return
    for mask, results in (
        ("scores", by.masked_linear_backward(*o.backward(ALL))),
        ("bits", by.masked_linear_packed_backward(*by_bits, ALL)),
    ):
        yield from ((f"{name} of all by {mask}", result) for name, result in zip(GRADIENTS, results, strict=True))
    by_both = (*given, o.packed, o.scores, None, o.mode)
    yield "d_scores by bits and scores", by.masked_linear_packed_backward(*by_both, D_SCORES)[2]
    yield from every_sum(by, o, before(o, o.scores.dtype))


def every_sum(
    by: Any, o: Operands, out: Tensor, copy: Callable[[Tensor], Tensor] = Tensor.clone
) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, a copy of ``out`` plus d_scores) for each kind of sign, and for the product without a weight."""
    given = (o.grad_output, o.x, o.weight)
    for name, sign in (
        ("scores", (o.scores, None, o.mode)),
        ("signs", (None, o.signs, o.mode)),
        ("no sign", (None, None, "value")),
    ):
        added = copy(out)
        by.accumulate_score_grad(added, *given, *sign)
        yield f"d_scores added by {name}", added
    added = copy(out)
    by.accumulate_product(added, o.grad_output, o.x)
    yield "product added", added


def before(o: Operands, dtype: torch.dtype) -> Tensor:
    """Return the contents of a buffer before a gradient is added: integers from -2 to 2."""
    integers = torch.arange(o.weight.numel(), device=o.weight.device).view(o.weight.shape) % 5 - 2
    return integers.to(dtype)


def assert_same(got: Tensor, expected: Tensor, what: str = "", *, small: bool = True) -> None:
    """Assert equal dtype, shape and elements; NaN equals NaN. small: bf16 holds every integer of the result."""
    got = got.cpu()
    assert got.dtype == expected.dtype, what
    assert got.shape == expected.shape, what
    finite = expected[expected.isfinite()]
    if small and expected.dtype == torch.bfloat16 and finite.numel():
        assert finite.abs().max() <= 256, f"{what}: operands too large for an exact comparison"
    assert torch.equal(got.isnan(), expected.isnan()), f"{what}: NaN where there is none, or none where there is"
    assert torch.equal(got.nan_to_num(), expected.nan_to_num()), (what, (got != expected).nonzero()[:5])


def assert_equals_reference(by: Any, o: Operands, *, gradients: bool = True) -> None:
    """Assert that every product of ``by`` on ``o``, on any device, equals the reference."""
    expected = every_product(oracle, o.to(torch.device("cpu")), gradients=gradients)
    for (name, got), (_, right) in zip(every_product(by, o, gradients=gradients), expected, strict=True):
        assert_same(got, right, name)


def assert_no_pitch_is_read(by: Any, o: Operands, *strided: str, gradients: bool = True) -> None:
    """Assert that operands with a pitch give the products of contiguous ones, multiplied in fp32."""
    exact = o.to(torch.device("cpu")).change(Tensor.float, "x", "weight", "bias", "grad_output")
    expected = every_product(oracle, exact, gradients=gradients)
    results = every_product(by, o.change(pitched, *strided), gradients=gradients)
    for (name, got), (_, right) in zip(results, expected, strict=True):
        assert_same(got, right.to(got.dtype), f"{name}, strided: {strided}")


def assert_rows_are_independent(by: Any, o: Operands) -> None:
    """Assert that a token of NaN affects only its own row of y, and one of grad_output only its own row of d_x."""
    token = len(o.x) // 2
    o = o.change(Tensor.clone, "x", "grad_output")
    o.x[token] = o.grad_output[token] = torch.nan
    for name, got in every_product(by, o, gradients=False):
        assert got.isnan().any(1).nonzero().tolist() == [[token]], (name, o.weight.shape)
