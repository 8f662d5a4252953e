"""What NVIDIA GPUs' approximate instructions may change in the 8-bit step, by a reference whose quotients are off.

PTX documents 2 units in the last place at most for div.approx.f32, and fewer for sqrt.approx.f32. No GPU is needed.
"""

import numpy as np
import pytest
import torch
from by_name import oracle
from score_steps import DEFAULTS, MEAN, SQUARE, arguments, assert_state_is_near, copied, normal

OFF = {
    "up": lambda shape: 1,
    "down": lambda shape: -1,
    "both ways": lambda shape: torch.randint(-1, 2, shape, dtype=torch.int32),
}


def off_by(monkeypatch, units, way):
    """Move torch's quotients and roots of fp32 by some units in the last place; zeros, infinities and NaN stay."""

    def off(operation):
        def moved(*args):
            found = operation(*args)
            if found.dtype != torch.float32:  # the reference takes the root in double
                return found * (1 + way(found.shape) * units * 2.0**-23) if found.dtype == torch.float64 else found
            usual = (found != 0) & found.isfinite()
            return torch.where(usual, (found.view(torch.int32) + units * way(found.shape)).view(torch.float32), found)

        return moved

    for name in ("__truediv__", "sqrt"):
        monkeypatch.setattr(torch.Tensor, name, off(getattr(torch.Tensor, name)))


def steps(tensors, monkeypatch, units, way):
    """Yield the states after each of three steps, exact and off, each from the state that the last one left off."""
    for number in (1, 2, 3):
        options = DEFAULTS | {"step": number, "weight_decay": 0.01, "keep_ratio": None}
        exact = copied(tensors)
        oracle.score_step(**exact, **options)
        with monkeypatch.context() as patch:
            off_by(patch, units, way)
            oracle.score_step(**tensors, **options)
        yield tensors, exact


@pytest.mark.parametrize("way", OFF)
@pytest.mark.parametrize("dtype", [torch.int16, torch.bfloat16, torch.float32], ids=str)
def test_two_units_in_the_last_place_change_few_roundings_by_one(dtype, way, monkeypatch):
    for weight_dtype in (torch.bfloat16, None):
        for ours, theirs in steps(arguments((300, 1000), dtype, True, weight_dtype), monkeypatch, 2, OFF[way]):
            assert_state_is_near(ours, theirs)


def test_a_larger_error_is_noticed(monkeypatch):
    (ours, theirs), *_ = steps(arguments((300, 1000), torch.int16, True), monkeypatch, 2**14, OFF["up"])
    with pytest.raises(AssertionError):
        assert_state_is_near(ours, theirs)


@pytest.mark.parametrize("bias", [MEAN[0], SQUARE[0]])
def test_a_product_rounded_toward_zero_is_the_fixed_point_number_of_a_code(bias):
    """The kernel's mul.rz.f32 by 2^(bias - 127), against the formula of reference.step.encode."""
    exponents = torch.arange(-140, 2).repeat(100)
    y = torch.cat((normal(exponents.numel()).abs() * 2.0**exponents, torch.tensor([0.0, 2.0 ** (1 - bias), 1.875])))
    exact = y.numpy().astype(np.float64) * 2.0 ** (bias - 127)
    product = exact.astype(np.float32)
    product = np.where(product > exact, np.nextafter(product, np.float32(0)), product)
    small = (y.double() * 2.0 ** (22 + bias)).floor().int()
    expected = torch.where(y < 2.0 ** (1 - bias), small, y.view(torch.int32) - ((127 - bias) << 23))
    assert torch.equal(torch.from_numpy(product).view(torch.int32), expected)
