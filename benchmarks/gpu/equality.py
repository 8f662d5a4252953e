"""Compare a backend's ops with the reference bit for bit: checks by name, each run when its turn comes."""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from mft_kernels import reference
from mft_kernels.backends.table import registered
from mft_kernels.testing import Inputs

from .operands import MODE

REFERENCE = "reference"
#: Ops that change their first argument.
_IN_PLACE = ("accumulate_score_grad", "accumulate_score_grad_grouped")

Check = tuple[str, Callable[[], Any]]
#: (op, variant, its arguments except the backend)
Call = tuple[str, str, tuple[Any, ...]]

WANTED = [True, False, True, True]  # d_x, d_scores, d_bias: what training asks for
EVERYTHING = [True, True, True, True]
_RATIO = 0.9


def results(name: str, backend: str, arguments: Iterable[Any]) -> tuple[Tensor, ...]:
    """Return an op's results by a backend's kernels; for an in-place op, the changed copy of its first argument.

    The op is called as torch.ops.mft: unchecked, and without a gradient of its own.
    """
    op, arguments = getattr(torch.ops.mft, name), list(arguments)
    if name in _IN_PLACE:
        arguments[0] = arguments[0].clone()
        op(*arguments, backend)
        return (arguments[0],)
    found = op(*arguments, backend)
    return (found,) if isinstance(found, Tensor) else tuple(found)


def equal(backend: str, label: str, calls: Iterable[Call], *, poison: bool = False) -> Iterator[Check]:
    """Yield a check for each call.

    The inputs must be small integers: then sums are exact in fp32, and the only rounding is the kernel's last step.
    ``poison``: see poisoned.
    """
    for name, how, arguments in calls:
        got = functools.partial(results, name, backend, arguments)
        expected = functools.partial(results, name, REFERENCE, [widened(value) for value in arguments])
        yield named(name, how, label), functools.partial(assert_equal, got, expected, poison=poison)


def dense_calls(t: Inputs, threshold: Tensor, mode: str = MODE, wanted: Sequence[bool] = WANTED) -> Iterator[Call]:
    """Yield both products and both backwards, from scores and from bits."""
    packed, signs = reference.pack_mask(t.scores, threshold, mode), reference.pack_signs(t.scores)[0]
    yield "masked_linear", "", (t.x, t.weight, t.scores, threshold, t.bias, mode)
    yield "masked_linear_packed", "", (t.x, t.weight, packed, t.bias)
    yield "masked_linear_backward", "", (t.grad_output, t.x, t.weight, t.scores, threshold, mode, wanted)
    by_bits = (t.grad_output, t.x, t.weight, packed, t.scores, signs, mode, wanted)
    yield "masked_linear_packed_backward", "", by_bits


def accumulating_calls(t: Inputs, mode: str = MODE) -> Iterator[Call]:
    """Yield calls that add d_scores to a buffer: sign from bits, sign from scores, and without weight and sign."""
    signs = reference.pack_signs(t.scores)[0]
    wide, narrow = (torch.ones_like(t.weight, dtype=dtype).contiguous() for dtype in (torch.float32, t.weight.dtype))
    operands, own = (t.grad_output, t.x), name_of(t.weight.dtype)
    for how, out, factors in (
        ("bits into float32", wide, (t.weight, None, signs)),
        (f"scores into {own}", narrow, (t.weight, t.scores, None)),
        ("no weight, into float32", wide, (None, None, None)),
        (f"no weight, into {own}", narrow, (None, None, None)),
    ):
        yield "accumulate_score_grad", how, (out, *operands, *factors, mode)


def many_calls(t: Inputs, threshold: Tensor, mode: str = MODE) -> Iterator[Call]:
    """Yield calls with a mask for each row, one of two or none."""
    masks = [reference.pack_mask(t.scores, each, mode) for each in (threshold, torch.zeros_like(threshold))]
    tasks = torch.arange(len(t.x), device=t.x.device) % 3 - 1
    yield "masked_linear_many", "", (t.x, t.weight, masks, tasks, t.bias)
    yield "masked_linear_many_backward", "", (t.grad_output, t.weight, masks, tasks)


def selection_checks(
    label: str, scores: Tensor, threshold: Tensor, backend: str, *, poison: bool = False
) -> Iterator[Check]:
    """Yield checks of kept_threshold with and without ties, pack_mask and pack_signs."""
    normal = torch.randn(scores.shape, device=scores.device).to(scores.dtype)
    for how, values in (("ties", scores), ("normal", normal)):
        for mode in (MODE, "value"):
            got = functools.partial(results, "kept_threshold", backend, (values, _RATIO, mode))
            # Replaces the reference's kthvalue, which takes a second at the sizes of a real layer.
            expected = functools.partial(lambda *by: [by_sorting(*by)], values, mode)
            check = functools.partial(assert_equal, got, expected, poison=poison)
            yield named("kept_threshold", how, mode, label), check
    masks: list[Call] = [("pack_mask", "", (scores, threshold, MODE)), ("pack_signs", "", (scores,))]
    yield from equal(backend, label, masks, poison=poison)


def flips_check(label: str, t: Inputs, threshold: Tensor, backend: str) -> Check:
    """Check a change from one in-place mask to another and back, by the functions of one backend or of none."""
    masks = [reference.pack_mask(t.scores, each, MODE) for each in (threshold, threshold - 1)]

    def changed(by: str) -> list[Tensor]:
        weight, serves = t.weight.clone(), registered(by).function
        first = serves("put_aside")(weight, masks[0])
        serves("drop")(weight, masks[0])
        serves("put_back")(weight, first, masks[0], masks[1])
        second = serves("put_aside")(weight, masks[1], (first, masks[0]))
        serves("drop")(weight, masks[1], masks[0])
        held = weight.clone()
        serves("put_back")(weight, second, masks[1])
        return [first, second, held, weight]

    got, expected = functools.partial(changed, backend), functools.partial(changed, REFERENCE)
    return named("mask in place", label), functools.partial(assert_equal, got, expected, poison=True)


def thresholds_check(label: str, scores: Tensor, backend: str) -> Check:
    """Check kept_thresholds of experts' scores."""
    got = functools.partial(results, "kept_thresholds", backend, (scores, _RATIO, MODE))

    def expected() -> list[Tensor]:
        return [torch.stack([by_sorting(each, MODE) for each in scores])]

    return named("kept_thresholds", label), functools.partial(assert_equal, got, expected, poison=True)


def assert_equal(
    run: Callable[[], Iterable[Tensor]], expect: Callable[[], Iterable[Tensor]], *, poison: bool = False
) -> None:
    """Assert equality in every bit, after the expected value is rounded to the dtype of the result."""
    with poisoned() if poison else nullcontext():
        results = list(run())
    for i, (got, expected) in enumerate(zip(results, expect(), strict=True)):
        assert got.shape == expected.shape, f"output {i}: shape {tuple(got.shape)}, not {tuple(expected.shape)}"
        wrong = (got != expected.to(got.dtype)).sum().item()
        assert wrong == 0, f"output {i}: {wrong} of {got.numel()} elements differ"


@contextmanager
def poisoned() -> Iterator[None]:
    """Fill new allocations with NaN within the context, so that an element that nobody writes is seen.

    Not for cuBLAS, which has no deterministic form without its own setting.
    """
    torch.use_deterministic_algorithms(True)  # also fills uninitialized memory, by default
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def widened(value: Any) -> Any:
    """Return the value in fp32 if it is a tensor of floats."""
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


def named(*parts: str) -> str:
    """Return the name of a check."""
    return ", ".join(part for part in parts if part)


def name_of(dtype: torch.dtype) -> str:
    """Return the dtype's name without "torch."."""
    return str(dtype).removeprefix("torch.")


def by_sorting(values: Tensor, mode: str) -> Tensor:
    """Compute kept_threshold by sorting."""
    keys = (values.abs() if mode == MODE else values).flatten()
    return keys.sort().values[keys.numel() - reference.kept_count(keys.numel(), _RATIO)]
