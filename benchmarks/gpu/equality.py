"""Every op of a set of kernels against the reference, bit for bit: checks by name, each run when its turn comes."""

import functools
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from mft_kernels import reference
from mft_kernels.testing import Inputs

from .cases import AUTO
from .competitors import MODE, outputs
from .kernels import SCRATCH

Check = tuple[str, Callable[[], Any]]

WANTED = [True, False, True, True]  # d_x, d_scores, d_bias: what training asks for


def op_checks(
    label: str, t: Inputs, threshold: Tensor, by: SimpleNamespace, mode: str = MODE, wanted: list[bool] = WANTED
) -> Iterator[Check]:
    """Both products and both backwards, from scores and from bits, and accumulation; inputs are small integers."""
    packed = reference.pack_mask(t.scores, threshold, mode)
    signs = reference.pack_signs(t.scores)[0]
    # In fp32 every sum is exact; the one rounding is that of the kernels' own last step.
    x, weight, scores, bias, grad = (v.float() for v in (t.x, t.weight, t.scores, t.bias, t.grad_output))
    by_scores, by_bits = (t.scores, threshold), (packed, t.scores, signs)
    calls: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
        "masked_linear": (
            lambda: by.masked_linear(t.x, t.weight, *by_scores, t.bias, mode),
            lambda: reference.masked_linear(x, weight, scores, threshold.float(), bias, mode),
        ),
        "masked_linear_packed": (
            lambda: by.masked_linear_packed(t.x, t.weight, packed, t.bias),
            lambda: reference.masked_linear_packed(x, weight, packed, bias),
        ),
        "masked_linear_backward": (
            lambda: by.masked_linear_backward(t.grad_output, t.x, t.weight, *by_scores, mode, wanted),
            lambda: reference.masked_linear_backward(grad, x, weight, scores, threshold.float(), mode, wanted),
        ),
        "masked_linear_packed_backward": (
            lambda: by.masked_linear_packed_backward(t.grad_output, t.x, t.weight, *by_bits, mode, wanted),
            lambda: reference.masked_linear_packed_backward(grad, x, weight, packed, scores, signs, mode, wanted),
        ),
    }
    for name, (run, expect) in calls.items():
        yield f"{name}, {label}", functools.partial(assert_equal, run, expect)
    if by.name not in (AUTO, SCRATCH):  # they choose a product, and this is none
        operands = (t.grad_output, t.x)
        for name, dtype, sign in (
            ("bits into fp32", torch.float32, (None, signs)),
            (f"scores into {name_of(t.weight.dtype)}", t.weight.dtype, (t.scores, None)),
        ):
            run = functools.partial(_accumulates, "accumulate_score_grad", by, dtype, *operands, t.weight, *sign, mode)
            yield f"accumulate_score_grad, {name}, {label}", run
        for dtype in (torch.float32, t.weight.dtype):
            run = functools.partial(_accumulates, "accumulate_product", by, dtype, *operands)
            yield f"accumulate_product, into {name_of(dtype)}, {label}", run


def selection_checks(label: str, scores: Tensor, threshold: Tensor, by: SimpleNamespace) -> Iterator[Check]:
    """kept_threshold with ties and without, pack_mask and pack_signs."""
    normal = torch.randn(scores.shape, device=scores.device).to(scores.dtype)
    for name, values in (("ties", scores), ("normal", normal)):
        for mode in (MODE, "value"):
            yield (
                f"kept_threshold, {name}, {mode}, {label}",
                functools.partial(
                    assert_equal,
                    functools.partial(by.kept_threshold, values, 0.9, mode),
                    # Not the reference's kthvalue, which takes a second at the sizes of a real layer.
                    functools.partial(by_sorting, values, mode),
                ),
            )
    masks = (lambda of: of.pack_mask(scores, threshold, MODE)), (lambda of: of.pack_signs(scores))
    for name, run in zip(("pack_mask", "pack_signs"), masks):
        got, expected = functools.partial(run, by), functools.partial(run, reference)
        yield f"{name}, {label}", functools.partial(assert_equal, got, expected)


def assert_equal(run: Callable[[], Any], expect: Callable[[], Any]) -> None:
    """In every bit, once the expected value is rounded to the dtype of what came."""
    for i, (got, expected) in enumerate(zip(outputs(run()), outputs(expect()), strict=True)):
        assert got.shape == expected.shape, f"output {i}: shape {tuple(got.shape)}, not {tuple(expected.shape)}"
        wrong = (got != expected.to(got.dtype)).sum().item()
        assert wrong == 0, f"output {i}: {wrong} of {got.numel()} elements differ"


def poisoned(by: SimpleNamespace) -> SimpleNamespace:
    """The same kernels, what they allocate begins as NaN, so that an element that nobody writes is seen.

    Not for cuBLAS, which has no deterministic form without a setting of its own.
    """

    def wrapped(run: Callable) -> Callable:
        def op(*arguments):
            torch.use_deterministic_algorithms(True)  # fills uninitialized memory, which is its default
            try:
                return run(*arguments)
            finally:
                torch.use_deterministic_algorithms(False)

        return op

    ops = {name: wrapped(run) for name, run in vars(by).items() if callable(run)}
    return SimpleNamespace(name=by.name, **ops)


def name_of(dtype: torch.dtype) -> str:
    """Without "torch."."""
    return str(dtype).removeprefix("torch.")


def _accumulates(op: str, by: SimpleNamespace, dtype: torch.dtype, grad: Tensor, x: Tensor, *rest: Any) -> None:
    got = torch.ones(grad.shape[-1], x.shape[-1], dtype=dtype, device=x.device)
    expected = got.float()
    getattr(by, op)(got, grad, x, *rest)
    widened = (v.float() if isinstance(v, Tensor) and v.is_floating_point() else v for v in (grad, x, *rest))
    getattr(reference, op)(expected, *widened)
    assert_equal(lambda: got, lambda: expected)


def by_sorting(values: Tensor, mode: str) -> Tensor:
    """kept_threshold at 0.9."""
    keys = (values.abs() if mode == MODE else values).flatten()
    return keys.sort().values[keys.numel() - reference.kept_count(keys.numel(), 0.9)]
