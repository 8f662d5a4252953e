"""Every backend's kernels over experts equal the reference, whatever rows an expert has, in both layouts.

test_grouped_ops.py tests the public ops, with their gradients.
"""

import itertools
from dataclasses import replace

import pytest
import torch
from by_name import oracle
from experts import assert_product_equals_reference, assert_sums_equal_reference, integer_experts
from forms import every_backend_but_cuda
from products import DTYPES

from mft_kernels import reference
from mft_kernels.testing import assert_within_budget

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
pytestmark = every_backend_but_cuda

LAYOUTS = pytest.mark.parametrize("transposed", [False, True], ids=["(E, N, K)", "(E, K, N)"])
ACCUMULATE = pytest.mark.parametrize("accumulate", [False, True], ids=["anew", "added"])
TENSORS = ("x", "weight", "scores", "bias", "offsets", "grad_output", "threshold")
#: numpy's warning for NaN times a number, in Triton's interpreter.
FROM_NUMPY = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")


def experts(kernels, n, k, dtype=FP16, scores_dtype=None, **options):
    """Return integer_experts on the device, with scores in the weight's dtype, which every backend reads."""
    kernels.need(dtype)
    t = integer_experts(n, k, dtype, scores_dtype or dtype, **options)
    return replace(t, **{name: getattr(t, name).to(kernels.device) for name in TENSORS})


def masks_of(t, mode="magnitude"):
    """Return [((scores, threshold, bits), mode)] for a product: with bits, and with scores."""
    return [((None, None, t.words(mode)), "value"), ((t.scores, t.threshold, None), mode)]


@LAYOUTS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_row_meets_its_own_expert(kernels, dtype, transposed):
    """Rows that are whole 16-byte chunks and rows that are not, forward and backward."""
    for sizes, mode in kernels.fewer(
        [(sizes, mode) for sizes in ((21, 19), (16, 32), (56, 40)) for mode in ("magnitude", "value")], 6
    ):
        t = experts(kernels, *sizes, dtype, transposed=transposed)
        for mask, told in masks_of(t, mode):
            assert_product_equals_reference(kernels, t.x, t.weight, *mask, t.offsets, t.bias, told, transposed)
            d_x = (t.grad_output, t.weight, *mask, t.offsets, None, told, not transposed)
            assert_product_equals_reference(kernels, *d_x)


@LAYOUTS
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_scores_of_another_dtype_tell_the_same(kernels, dtype, transposed):
    t = experts(kernels, 24, 40, dtype, FP32, transposed=transposed)
    for mode in kernels.fewer(("value", "magnitude"), 2):
        for mask, told in masks_of(t, mode):
            assert_product_equals_reference(kernels, t.x, t.weight, *mask, t.offsets, None, told, transposed)


@pytest.mark.parametrize(("dtype", "out_dtype"), [(FP32, FP32), (BF16, FP32), (FP16, FP16), (BF16, BF16)], ids=str)
def test_every_expert_s_sums_are_of_its_own_rows(kernels, dtype, out_dtype):
    layouts = [((21, 19), False), ((24, 40), True)]
    cases = list(itertools.product(layouts, (False, True), ("scores", "signs", None)))
    for (sizes, transposed), accumulate, source in kernels.fewer(cases, 5):
        t = experts(kernels, *sizes, dtype, FP32 if out_dtype == FP32 else dtype, transposed=transposed)
        assert_sums_equal_reference(kernels, t, source, out_dtype, accumulate=accumulate)
        if source == "scores":
            assert_sums_equal_reference(kernels, t, source, out_dtype, accumulate=accumulate, mode="value")


@ACCUMULATE
def test_sums_of_experts_without_rows_are_exactly_0_or_as_they_were(kernels, accumulate):
    for n, k in ((24, 40), (9, 13), (24, 1)):
        t = experts(kernels, n, k, rows=(0, 5, 0))
        t.weight[0], t.weight[2] = torch.inf, torch.nan
        out = torch.full((3, n, k), 7.0, device=kernels.device)
        arguments = (t.grad_output, t.x, t.offsets, t.weight, t.scores, None, "value", accumulate)
        kernels.grouped_score_grad(out, *arguments)
        assert out[[0, 2]].eq(7 if accumulate else 0).all()
        assert not out[1].eq(7 if accumulate else 0).all()


@FROM_NUMPY
@LAYOUTS
def test_what_is_dropped_has_no_rows_or_is_nobody_s_may_be_nan(kernels, transposed):
    t = experts(kernels, 40, 48, transposed=transposed)
    dropped = [~reference.keep_mask(s, c, "magnitude") for s, c in zip(t.scores.cpu(), t.threshold.cpu())]
    t.weight[torch.stack(dropped).to(kernels.device)] = torch.nan
    t.weight[0] = t.weight[3] = torch.inf
    t.x[int(t.offsets[-1]) :] = torch.nan
    t.x[1] = torch.inf  # a row of the expert with 7
    for mask, told in masks_of(t):
        assert_product_equals_reference(kernels, t.x, t.weight, *mask, t.offsets, t.bias, told, transposed)


@pytest.mark.parametrize(
    "ends", [(5, 2, 40, 30, 99, 7, 8), (-3, -1, 4, 4, 2, 0, -9), (70, 0, 0, 0, 0, 0, 0), (0,) * 7], ids=str
)
def test_offsets_that_fall_or_exceed_the_rows_are_taken_as_the_reference_takes_them(kernels, ends):
    t = experts(kernels, 16, 32)
    t.offsets = torch.tensor(ends, dtype=torch.int32, device=kernels.device)
    for mask, told in masks_of(t):
        assert_product_equals_reference(kernels, t.x, t.weight, *mask, t.offsets, t.bias, told, False)
    for accumulate in (True, False):
        assert_sums_equal_reference(kernels, t, "scores", FP32, accumulate=accumulate)


@pytest.mark.parametrize(
    ("n", "k", "rows"), [(5, 0, (2, 0, 3)), (0, 5, (2, 0, 3)), (1, 1, (1,)), (5, 7, (0, 0))], ids=str
)
def test_axes_of_none_and_of_one(kernels, n, k, rows):
    for transposed in (False, True):
        t = experts(kernels, n, k, rows=rows, nobodys=2 if any(rows) else 0, transposed=transposed)
        for mask, told in masks_of(t):
            assert_product_equals_reference(kernels, t.x, t.weight, *mask, t.offsets, t.bias, told, transposed)
        for accumulate in (True, False):
            assert_sums_equal_reference(kernels, t, None, FP32, accumulate=accumulate)


def test_matrices_inside_larger_ones_are_read_as_they_lie(kernels):
    """Matrices at any distance: one may consist of whole 16-byte chunks, and the next one not."""
    for rows, pitch, column, mode in ((26, 45, 3, "magnitude"), (26, 48, 8, "value"), (25, 40, 0, "magnitude")):
        t = experts(kernels, 24, 40)
        around = torch.full((7, rows, pitch), torch.nan, dtype=FP16, device=kernels.device)
        weight, scores = around[:, :24, column : column + 40], torch.full_like(around, torch.nan)[:, :24, :40]
        t.weight, t.scores = weight.copy_(t.weight), scores.copy_(t.scores)
        for mask, told in masks_of(t, mode):
            assert_product_equals_reference(kernels, t.x, t.weight, *mask, t.offsets, t.bias, told, False)
            assert_product_equals_reference(kernels, t.grad_output, t.weight, *mask, t.offsets, None, told, True)
        assert_sums_equal_reference(kernels, t, "scores", FP32, accumulate=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rounding_errors_stay_within_twice_those_of_pytorch(kernels, dtype):
    kernels.need(dtype)
    generator = torch.Generator().manual_seed(0)
    x, grad = torch.randn(30, 96, generator=generator), torch.randn(30, 24, generator=generator)
    weight = torch.randn(3, 24, 96, generator=generator) * 0.02
    offsets, thresholds = torch.tensor([5, 5, 29], dtype=torch.int32), torch.full((3,), 0.01)

    def products(by, cast, device):
        def there(value):
            return value.to(device, cast)

        given = (there(weight), there(weight), there(thresholds), None, offsets.to(device), None, "magnitude")
        out = torch.zeros(3, 24, 96, device=device, dtype=torch.float64 if cast == torch.float64 else torch.float32)
        sums = (offsets.to(device), there(weight), there(weight), None, "magnitude", True)
        by.grouped_score_grad(out, there(grad), there(x), *sums)
        return [by.grouped_product(there(x), *given, False), by.grouped_product(there(grad), *given, True), out]

    got = products(kernels, dtype, kernels.device)
    plain, exact = (products(oracle, cast, "cpu") for cast in (dtype, torch.float64))
    for ours, same_dtype, truth in zip(got, plain, exact):
        assert_within_budget(ours.cpu(), same_dtype, truth)
