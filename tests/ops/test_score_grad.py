"""d_scores added to a buffer, and the product grad_output.T @ x on its own: every backend's equal the reference."""

import pytest
import torch
from by_name import oracle
from forms import FORMS, OTHERS, every_form
from products import DTYPES, MODES, Operands, assert_same, before, every_sum, integers

from mft_kernels.testing import assert_within_budget, integer_inputs, random_inputs

HALF = torch.float16
#: Kernels on which torch multiplies, which rounds the addend.
TORCHS_OWN = ("cpu-avx2", "cpu-portable", *OTHERS)


def assert_sums_equal_the_reference(kernels, o, out_dtype):
    """Assert the sums with a buffer's contents, for each kind of sign and without a weight."""
    on_cpu = o.to(torch.device("cpu"))
    expected = dict(every_sum(oracle, on_cpu, before(on_cpu, out_dtype)))
    for way in kernels.ways():
        if way.has_gradients:
            for name, got in every_sum(way, o, before(o, out_dtype)):
                assert_same(got, expected[name], name)


@every_form
@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_is_added_to_what_lies_there_in_every_dtype(kernels, dtype, out_dtype):
    kernels.need(dtype)
    mode = MODES[DTYPES.index(out_dtype) % 2]
    scores_dtype = DTYPES[(DTYPES.index(dtype) + DTYPES.index(out_dtype)) % 3]
    o = integers(17, 37, 40, dtype=dtype, scores_dtype=scores_dtype, mode=mode, device=kernels.device)
    assert_sums_equal_the_reference(kernels, o, out_dtype)


@every_form
@pytest.mark.parametrize("shape", [(0, 5, 7), (3, 0, 7), (3, 5, 0), (1, 1, 1), (3, 33, 41), (57, 17, 33)], ids=str)
def test_it_takes_empty_and_odd_shapes(kernels, shape):
    assert_sums_equal_the_reference(kernels, integers(*shape, device=kernels.device), torch.float32)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, in the interpreter
@every_form
@pytest.mark.parametrize("tokens", [0, 5])
def test_a_factor_of_0_times_a_weight_that_is_not_finite_is_nan(kernels, tokens):
    """The sum over no tokens is 0, and so is the sign of some scores."""
    o = integers(tokens, 37, 40)
    o.weight[:, ::3], o.weight[1, 1] = torch.nan, torch.inf
    assert_sums_equal_the_reference(kernels, o.to(kernels.device), torch.float32)


@every_form
def test_nan_and_zero_scores_have_no_sign(kernels):
    t = integer_inputs(6, 24, 40, HALF)
    t.scores[:, ::3], t.scores[:, 1::3], t.scores[::2, 1::3] = torch.nan, 0.0, -0.0
    o = Operands.of(t, 0.0).to(kernels.device)
    for way in kernels.ways():
        out = torch.zeros(24, 40, device=kernels.device)
        way.accumulate_score_grad(out, o.grad_output, o.x, o.weight, o.scores, None, "magnitude")
        d_scores = way.masked_linear_backward(
            o.grad_output, o.x, o.weight, o.scores, o.threshold, o.mode, [False, False, True, False]
        )[2]
        for gradient in (out, d_scores):
            assert not gradient[:, ::3].any()
            assert not gradient[:, 1::3].any()
            assert gradient[:, 2::3].any()


@pytest.mark.parametrize("kernels", [form for form in FORMS if form not in TORCHS_OWN], indirect=True)
def test_only_the_sum_is_rounded(kernels):
    """Near 2048, fp16 holds even numbers: 2049.0005 becomes 2050. A term rounded first is 1; 2049 becomes 2048."""
    x = torch.tensor([[1.0], [2.0**-11]], dtype=HALF, device=kernels.device).repeat(1, 40)
    ones = torch.ones(40, 40, dtype=HALF, device=kernels.device)
    fused = next(kernels.ways())
    by_weight, plain = 2048 * ones, 2048 * ones
    fused.accumulate_score_grad(by_weight, ones[:2], x, ones, None, None, "value")
    fused.accumulate_product(plain, ones[:2], x)
    for out in (by_weight, plain):
        assert (out == 2050).all()


@every_form
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_random_errors_stay_within_twice_those_of_pytorch(kernels, dtype):
    """The sums of two calls in fp32, which does not round the addends."""
    kernels.need(dtype)
    o = Operands.of(random_inputs(40, 33, 45, dtype), 0.0)

    def added(by, o, out):
        for _ in range(2):
            by.accumulate_score_grad(out, o.grad_output, o.x, o.weight, o.scores, None, "magnitude")
            by.accumulate_product(out, o.grad_output, o.x)
        return out

    pytorchs, exact = added(oracle, o, torch.ones(33, 45)), added(oracle, o.exact(), torch.ones(33, 45).double())
    for way in kernels.ways():
        got = added(way, o.to(kernels.device), torch.ones(33, 45, device=kernels.device))
        assert_within_budget(got.cpu(), pytorchs, exact)
