"""Compare products in the emulator with the reference's and with themselves in every schedule."""

import functools
from collections.abc import Callable

import emulated
import torch
from by_name import oracle
from products import D_X, Operands, assert_same
from torch import Tensor

from mft_kernels import reference
from mft_kernels.testing import Inputs, assert_within_budget


class OnDevice:
    """The emulator's ops on a device: OnDevice(multiprocessors=2).masked_linear(...)."""

    def __init__(self, **device) -> None:
        self._device = device

    def __getattr__(self, op: str) -> Callable:
        return functools.partial(getattr(emulated, op), **self._device)


def check_products(t: Inputs, threshold: Tensor, mode: str, **device) -> None:
    """Check forward and d_x, by scores with a bias and by packed mask without; the bias does not depend on the mask.

    Hopper's own product takes words in whole 16-byte chunks, and no scores with thresholds by row for d_x.
    """
    o, hopper = Operands.of(t, threshold, mode), device.get("arch") == "sm_90"
    calls = {"masked_linear": o.forward, "masked_linear_backward": o.backward(D_X)}
    if hopper and threshold.dim():
        del calls["masked_linear_backward"]
    if not hopper or o.packed.shape[1] % 4 == 0:
        calls["masked_linear_packed"] = (t.x, t.weight, o.packed, None)
        calls["masked_linear_packed_backward"] = (t.grad_output, t.x, t.weight, o.packed, None, None, mode, D_X)
    for op, arguments in calls.items():
        results, expected = (getattr(by, op)(*arguments) for by in (OnDevice(**device), oracle))
        is_tuple = isinstance(results, tuple)
        assert_same(results[0] if is_tuple else results, expected[0] if is_tuple else expected, op)


def assert_one_sum_in_every_schedule(run: Callable[[], Tensor], own: Tensor, exact: Tensor) -> None:
    """Assert the same bits whichever block ends first, and an error within the budget."""
    results = []
    for seed, asynchrony in enumerate(emulated.ASYNCHRONIES):
        emulated.set_settings(seed, asynchrony, emulated.SCHEDULES[seed % 2])
        results.append(run())
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    assert_within_budget(results[0], own, exact)


def assert_one_product_in_every_schedule(t: Inputs, *, transposed: bool, **device) -> None:
    """Assert it for the forward pass, or transposed for d_x, of random floats with a threshold."""
    threshold = reference.kept_threshold(t.scores, 0.9, "magnitude")
    op, arguments = "masked_linear", (t.x, t.weight, t.scores, threshold, t.bias, "magnitude")
    if transposed:
        op, arguments = "masked_linear_backward", (t.grad_output, *arguments[:4], "magnitude", D_X)
    double = [v.double() if isinstance(v, Tensor) else v for v in arguments]

    def made(by, given, **device):
        result = getattr(by, op)(*given, **device)
        return result[0] if transposed else result

    assert_one_sum_in_every_schedule(
        lambda: made(emulated, arguments, **device), made(oracle, arguments), made(oracle, double)
    )
