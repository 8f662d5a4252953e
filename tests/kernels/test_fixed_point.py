"""int16 scores: exact conversion, and selection of the codes by the kernels that select fp16 scores."""

import pytest
import torch
from products import MODES

import mft_kernels
from mft_kernels import fixed_from_float, float_from_fixed, reference
from mft_kernels.mask import masking
from mft_kernels.reference.fixed_point import FIXED_POINT_STEP, LARGEST_CODE, LARGEST_FIXED, code_at_least

EVERY_CODE = torch.arange(-0x8000, 0x8000, dtype=torch.int32).to(torch.int16)
FINITE = EVERY_CODE[(EVERY_CODE & 0x7FFF).le(LARGEST_CODE)]


def normal(*shape, seed=0):
    return 0.02 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_every_finite_code_survives_the_round_trip():
    values = float_from_fixed(FINITE)
    negative_zero = torch.tensor(-0x8000, dtype=torch.int16)
    assert torch.equal(fixed_from_float(values), FINITE.where(FINITE.ne(negative_zero), 0))
    assert values.dtype == torch.float32
    assert torch.equal(values.double(), torch.where(FINITE < 0, -1.0, 1.0) * (FINITE & 0x7FFF).double() / 2**18)


def test_codes_read_as_fp16_order_as_their_values_and_are_finite_together():
    order = FINITE.view(torch.float16).double().argsort(stable=True)
    sorted_values = float_from_fixed(FINITE)[order]
    assert (sorted_values.diff() >= 0).all()
    assert torch.equal(float_from_fixed(EVERY_CODE).isfinite(), EVERY_CODE.view(torch.float16).isfinite())


def test_floats_round_to_the_nearest_code_and_saturate():
    scores = torch.tensor([1.4, 1.6, -2.5, 0.0, -0.0]) * FIXED_POINT_STEP
    assert float_from_fixed(fixed_from_float(scores)).div(FIXED_POINT_STEP).tolist() == [1, 2, -2, 0, 0]
    assert fixed_from_float(torch.tensor([0.0, -0.0])).tolist() == [0, 0]
    large = torch.tensor([1.0, -1.0, LARGEST_FIXED])
    assert float_from_fixed(fixed_from_float(large)).tolist() == [LARGEST_FIXED, -LARGEST_FIXED, LARGEST_FIXED]
    error = float_from_fixed(fixed_from_float(normal(1000))) - normal(1000)
    assert error.abs().max() <= FIXED_POINT_STEP / 2


def test_what_is_not_finite_stays_so():
    codes = fixed_from_float(torch.tensor([torch.nan, torch.inf, -torch.inf]))
    assert not codes.view(torch.float16).isfinite().any()
    assert not float_from_fixed(codes).isfinite().any()


def test_codes_that_are_not_finite_are_an_error_that_counts_them():
    codes = fixed_from_float(normal(3, 5))
    codes[1, 2] = LARGEST_CODE + 1
    for find in (
        lambda: mft_kernels.kept_threshold(codes, 0.9),
        lambda: masking.current_mask(codes, 0.9, 0.01, "value"),
    ):
        with pytest.raises(ValueError, match="got 1 NaN or Inf among"):
            find()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("threshold", [0.01, 0.01 + FIXED_POINT_STEP / 2, -0.003, 0.0, 1.0, -1.0])
def test_a_fixed_threshold_keeps_the_codes_whose_values_reach_it(mode, threshold):
    codes = fixed_from_float(normal(37, 45))
    codes[0, :2] = torch.tensor([LARGEST_CODE, LARGEST_CODE - 0x8000])
    mask = masking.current_mask(codes, 0.9, threshold, mode)
    expected = reference.pack_mask(float_from_fixed(codes), torch.tensor(threshold), mode)
    assert torch.equal(mask.packed, expected)
    assert mask.signs is None


def test_the_smallest_code_that_reaches_a_threshold():
    assert code_at_least(2.5 * FIXED_POINT_STEP) == 3
    assert code_at_least(-2.5 * FIXED_POINT_STEP) == 2 - 0x8000
    assert code_at_least(0.0) == code_at_least(-0.0) == 0
    assert code_at_least(torch.inf) == LARGEST_CODE + 1
    assert code_at_least(-torch.inf) == LARGEST_CODE + 1 - 0x8000


@pytest.mark.parametrize("mode", MODES)
def test_a_layer_computes_from_codes_what_it_computes_from_their_values(mode):
    codes = fixed_from_float(normal(12, 45))
    x, weight = normal(3, 45, seed=1).requires_grad_(), normal(12, 45, seed=2)
    results = []
    for scores in (codes, float_from_fixed(codes)):
        y = mft_kernels.masked_linear_by_ratio(x, weight, scores, keep_ratio=0.8, mode=mode)
        results.append((y.detach(), *torch.autograd.grad(y.sum(), x)))
    for a, b in zip(*results):
        assert torch.equal(a, b)
