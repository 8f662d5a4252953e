"""Compare products in the emulator with the reference's and with themselves in every schedule."""

from collections.abc import Callable

import emulated
import torch
from by_name import oracle
from products import D_X, assert_same
from torch import Tensor

from mft_kernels import reference
from mft_kernels.testing import Inputs, assert_within_budget


def one_threshold(t: Inputs) -> Tensor:
    """Return a threshold with ties among the scores of integer_inputs."""
    return torch.ones((), dtype=t.scores.dtype)


def check_products(t: Inputs, threshold: Tensor, mode: str, **device) -> None:
    """Check forward and d_x, by scores with a bias and by packed mask without; the bias does not depend on the mask.

    Hopper's own product takes words in whole 16-byte chunks.
    """
    packed = reference.pack_mask(t.scores, threshold, mode)
    by_words = device.get("arch") != "sm_90" or packed.shape[1] % 4 == 0
    expected = oracle.masked_linear(t.x, t.weight, t.scores, threshold, t.bias, mode)
    assert_same(emulated.masked_linear(t.x, t.weight, t.scores, threshold, t.bias, mode, **device), expected)
    if by_words:
        expected = oracle.masked_linear_packed(t.x, t.weight, packed, None)
        assert_same(emulated.masked_linear_packed(t.x, t.weight, packed, None, **device), expected)
    arguments = (t.grad_output, t.x, t.weight)
    expected = oracle.masked_linear_backward(*arguments, t.scores, threshold, mode, D_X)[0]
    got = emulated.masked_linear_backward(*arguments, t.scores, threshold, mode, D_X, **device)
    assert_same(got[0], expected)
    if by_words:
        got = emulated.masked_linear_packed_backward(*arguments, packed, None, None, mode, D_X, **device)
        assert_same(got[0], expected)


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
