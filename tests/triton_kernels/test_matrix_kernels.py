"""The matrix kernels equal the reference: in the interpreter with the form and tiles of each card, or on a GPU.

Inputs are small integers: sums are exact in any order, so results compare bit for bit and a tile that is dropped,
taken twice or taken from elsewhere is seen. The reference always runs on the CPU.
"""

from dataclasses import replace
from functools import partial

import pytest
import torch
from exact import (
    ALL,
    DTYPES,
    HALF,
    MODES,
    arguments_of_backward,
    assert_equals_reference,
    assert_every_op_equals_reference,
    assert_same,
    bits_of,
    integers,
    launches_of,
    threshold_of,
)

from mft_kernels import reference
from mft_kernels.backends.triton import ops
from mft_kernels.backends.triton.target import assume
from mft_kernels.by_name import ByName, oracle
from mft_kernels.testing import assert_within_budget, random_inputs

flat = ByName(ops)


@pytest.mark.parametrize("scores_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
def test_products_from_scores_equal_the_reference_in_every_dtype(device, target, mode, dtype, scores_dtype):
    t = integers(device, 17, 24, 40, dtype, scores_dtype)
    threshold = threshold_of(t.scores)
    assert_equals_reference("masked_linear", t.x, t.weight, t.scores, threshold, t.bias, mode)
    assert_equals_reference("masked_linear_backward", *arguments_of_backward(t, threshold, mode))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
def test_products_from_bits_equal_the_reference_in_every_dtype(device, target, mode, dtype):
    t = integers(device, 17, 24, 40, dtype, torch.bfloat16)
    packed, signs = bits_of(t.scores, threshold_of(t.scores), mode)
    for bias, sign in ((t.bias, (t.scores, None)), (None, (None, signs))):
        assert_equals_reference("masked_linear_packed", t.x, t.weight, packed, bias)
        arguments = (t.grad_output, t.x, t.weight, packed, *sign, mode, ALL)
        assert_equals_reference("masked_linear_packed_backward", *arguments)


def test_every_output_mask_gives_what_it_asks_for(device, target):
    t = integers(device, 17, 24, 40, HALF, torch.float32)
    threshold = threshold_of(t.scores)
    packed, signs = bits_of(t.scores, threshold, "magnitude")
    for wanted in range(16):
        output_mask = [bool(wanted >> i & 1) for i in range(4)]
        arguments = arguments_of_backward(t, threshold, output_mask=output_mask)
        assert_equals_reference("masked_linear_backward", *arguments)
        if not output_mask[3]:
            arguments = (t.grad_output, t.x, t.weight, packed, None, signs, "magnitude", output_mask)
            assert_equals_reference("masked_linear_packed_backward", *arguments)


def test_x_is_not_read_where_no_weight_or_score_asks_for_a_gradient(device, target):
    t = integers(device, 20, 40, 72, HALF)
    arguments = (t.grad_output, t.grad_output, t.weight, t.scores, threshold_of(t.scores), "value")
    d_x, _, _, d_bias = flat.masked_linear_backward(*arguments, [True, False, False, True])
    expected = oracle.masked_linear_backward(*(a.cpu() for a in arguments[:-1]), "value", [True, False, False, True])
    assert_same(d_x, expected[0])
    assert_same(d_bias, expected[3])


@pytest.mark.parametrize(("dtype", "out_dtype"), [*zip(DTYPES, DTYPES), (HALF, torch.float32), (torch.float32, HALF)])
def test_accumulation_adds_to_what_lies_there_in_every_dtype(device, target, dtype, out_dtype):
    t = integers(device, 17, 37, 40, dtype, torch.float32)
    signs = bits_of(t.scores, threshold_of(t.scores), "magnitude")[1]
    out = (torch.arange(37 * 40).view(37, 40) % 7).to(device, out_dtype)
    for sign in ((t.scores, None, "magnitude"), (None, signs, "magnitude"), (None, None, "value")):
        assert_equals_reference("accumulate_score_grad", out, t.grad_output, t.x, t.weight, *sign)
    assert_equals_reference("accumulate_product", out, t.grad_output, t.x)


def test_accumulation_without_a_weight_takes_empty_and_odd_shapes(device, target):
    for shape in ((0, 5, 7), (3, 0, 7), (3, 5, 0), (1, 1, 1), (3, 33, 41)):
        t = integers(device, *shape, HALF)
        out = torch.ones(shape[1:], device=device)
        assert_equals_reference("accumulate_product", out, t.grad_output, t.x)
        assert_equals_reference("accumulate_product", out, t.grad_output.T.contiguous().T, t.x)


def test_accumulation_rounds_the_sum_alone(device, target):
    # Near 2048 fp16 holds even numbers: 2049.0005 rounds up to 2050. A term rounded first is 1, and 2049 goes to 2048.
    x = torch.tensor([[1.0], [2.0**-11]], dtype=HALF, device=device).expand(2, 40)
    ones = torch.ones(40, 40, dtype=HALF, device=device)
    out = 2048 * ones
    flat.accumulate_score_grad(out, ones[:2], x, ones, None, None, "value")
    assert (out == 2050).all()


@pytest.mark.parametrize("mode", MODES)
def test_each_row_has_its_own_threshold(device, target, mode):
    n = 40 if target.backend == "interpreter" else 141
    t = integers(device, 17, n, 40, HALF, torch.bfloat16)
    thresholds = (torch.arange(n) % 6 - 1).to(device, torch.bfloat16)
    arguments = (t.x, t.weight, t.scores, thresholds, t.bias, mode)
    only_d_x = arguments_of_backward(t, thresholds, mode, [True, False, False, False])
    with assume(replace(target, multiprocessors=1)):
        assert_equals_reference("masked_linear", *arguments)
        assert_equals_reference("masked_linear", *arguments, choose=ops.always_scratch)
        assert_equals_reference("masked_linear_backward", *only_d_x)
        assert_equals_reference("masked_linear_backward", *arguments_of_backward(t, thresholds, mode))


@pytest.mark.parametrize("view", ["sliced", "expanded"])
@pytest.mark.parametrize("choose", [ops.always_fused, ops.always_scratch])
def test_thresholds_and_bias_may_have_a_stride(device, target, choose, view):
    t = integers(device, 17, 40, 40, HALF)
    thresholds = (torch.arange(40) % 6 - 1.0).to(device)
    if view == "sliced":
        thresholds = torch.stack([thresholds, torch.full_like(thresholds, torch.nan)], 1)[:, 0]
        bias = torch.stack([t.bias, torch.full_like(t.bias, torch.nan)], 1)[:, 0]
    else:
        # The neighbour in memory is NaN, or else the read beyond the end could go unseen.
        thresholds = torch.tensor([2.0, torch.nan], device=device)[:1].expand(40)
        bias = torch.tensor([3.0, torch.nan], dtype=HALF, device=device)[:1].expand(40)
    arguments = (t.x, t.weight, t.scores, thresholds, bias, "magnitude")
    assert_equals_reference("masked_linear", *arguments, choose=choose)
    arguments = (t.grad_output, t.x, t.weight, t.scores, thresholds, "magnitude", ALL)
    assert_equals_reference("masked_linear_backward", *arguments, choose=choose)


@pytest.mark.parametrize("shape", [(0, 40, 72), (1, 1, 1), (5, 1, 72), (5, 40, 1), (1, 24, 40), (17, 1, 1)])
def test_no_token_and_axes_of_one(device, target, shape):
    t = integers(device, *shape, HALF)
    assert_every_op_equals_reference(t, threshold_of(t.scores), "magnitude")
    for wanted in ([True, False, False, False], [False, True, False, True], [False, False, True, False]):
        arguments = arguments_of_backward(t, threshold_of(t.scores), "value", wanted)
        assert_equals_reference("masked_linear_backward", *arguments, choose=ops.always_scratch)


@pytest.mark.parametrize("shape", [(5, 0, 72), (5, 40, 0), (0, 0, 72), (0, 40, 0), (5, 0, 0)])
@pytest.mark.parametrize("choose", [ops.always_fused, ops.always_scratch])
def test_without_inputs_y_is_the_bias_and_without_outputs_d_x_is_zero(device, target, shape, choose):
    m, n, k = shape
    t = integers(device, *shape, HALF)
    threshold = threshold_of(t.scores)
    packed, signs = bits_of(t.scores, threshold, "magnitude")
    y = t.bias.cpu().expand(m, n)
    assert_same(flat.masked_linear(t.x, t.weight, t.scores, threshold, t.bias, "magnitude", choose=choose), y)
    assert_same(flat.masked_linear_packed(t.x, t.weight, packed, t.bias, choose=choose), y)
    assert_same(flat.masked_linear_packed(t.x, t.weight, packed, None, choose=choose), torch.zeros_like(y))
    for gradients in (
        flat.masked_linear_backward(*arguments_of_backward(t, threshold), choose=choose),
        flat.masked_linear_packed_backward(
            t.grad_output, t.x, t.weight, packed, t.scores, signs, "magnitude", ALL, choose=choose
        ),
    ):
        assert_same(gradients[0], torch.zeros(m, k, dtype=HALF))
        assert_same(gradients[1], torch.zeros(n, k, dtype=HALF))
        assert_same(gradients[2], torch.zeros(n, k))
        assert_same(gradients[3], t.grad_output.cpu().sum(0))
    flat.accumulate_score_grad(t.scores, t.grad_output, t.x, t.weight, None, signs, "magnitude")


@pytest.mark.parametrize(
    ("mode", "value"),
    [("magnitude", v) for v in (2.0, 3.0, 0.0, torch.inf)] + [("value", v) for v in (-1.0, -torch.inf, torch.nan)],
)
def test_ties_are_kept_and_so_can_be_all_or_none(device, target, mode, value):
    t = integers(device, 6, 24, 40, HALF)
    threshold = threshold_of(t.scores, value)
    assert_equals_reference("masked_linear", t.x, t.weight, t.scores, threshold, None, mode)
    assert_equals_reference("masked_linear_backward", *arguments_of_backward(t, threshold, mode))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, of sums times an infinite weight
@pytest.mark.parametrize("dtype", [torch.bfloat16, HALF])
def test_dropped_nan_and_inf_weights_contribute_an_exact_zero(device, target, dtype):
    t = integers(device, 9, 24, 40, dtype)
    kept = t.scores.abs() >= 2
    bad = torch.tensor([torch.nan, torch.inf, -torch.inf], device=device, dtype=dtype)
    t.weight = torch.where(kept, t.weight, bad[torch.arange(40, device=device) % 3])
    threshold = threshold_of(t.scores)
    packed, signs = bits_of(t.scores, threshold, "magnitude")
    forward = (t.x, t.weight, t.scores, threshold, t.bias, "magnitude")
    backward = arguments_of_backward(t, threshold)
    assert flat.masked_linear(*forward).isfinite().all()
    assert flat.masked_linear_backward(*backward)[0].isfinite().all()
    assert_equals_reference("masked_linear", *forward)
    assert_equals_reference("masked_linear", *forward, choose=ops.always_scratch)
    assert_equals_reference("masked_linear_packed", t.x, t.weight, packed, t.bias)
    assert_equals_reference("masked_linear_backward", *backward)
    assert_equals_reference("masked_linear_backward", *backward[:-1], [True, True, False, False])
    arguments = (t.grad_output, t.x, t.weight, packed, None, signs, "magnitude", ALL)
    assert_equals_reference("masked_linear_packed_backward", *arguments)


@pytest.mark.parametrize("mode", MODES)
def test_nan_scores_are_dropped_and_zero_and_nan_scores_have_no_sign(device, target, mode):
    t = integers(device, 6, 24, 40, HALF)
    t.scores[:, ::3] = torch.nan
    t.scores[:, 1::3] = 0.0
    t.scores[::2, 1::3] = -0.0
    for value in (2.0, 0.0, -torch.inf):
        threshold = threshold_of(t.scores, value)
        assert_equals_reference("masked_linear", t.x, t.weight, t.scores, threshold, t.bias, mode)
        assert_equals_reference("masked_linear_backward", *arguments_of_backward(t, threshold, mode))
    d_scores = flat.masked_linear_backward(*arguments_of_backward(t, threshold, "magnitude"))[2]
    assert (d_scores[:, ::3] == 0).all()
    assert (d_scores[:, 1::3] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)  # fp32 without TF32, which is PyTorch's default
def test_error_stays_within_twice_that_of_pytorch(device, target, dtype):
    t = random_inputs(17, 40, 136, dtype, torch.bfloat16)
    threshold = reference.kept_threshold(t.scores, 0.7, "magnitude")
    forward = (t.x, t.weight, t.scores, threshold, t.bias)
    backward = (t.grad_output, t.x, t.weight, t.scores, threshold)
    for op, arguments, rest in (
        ("masked_linear", forward, ("magnitude",)),
        ("masked_linear_backward", backward, ("magnitude", ALL)),
        ("masked_linear_backward", backward, ("magnitude", [True, False, False, False])),
    ):
        got = getattr(flat, op)(*(a.to(device) for a in arguments), *rest)
        same = getattr(oracle, op)(*arguments, *rest)
        exact = getattr(oracle, op)(*(a.double() for a in arguments), *rest)
        for g, s, e in zip(got, same, exact) if isinstance(got, tuple) else [(got, same, exact)]:
            if g.numel():
                assert_within_budget(g.cpu(), s, e)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
def test_the_pass_through_scratch_equals_the_fused_product(device, mode, dtype):
    t = integers(device, 19, 70, 72, dtype, torch.bfloat16)
    threshold = threshold_of(t.scores)
    packed, signs = bits_of(t.scores, threshold, mode)
    for op, arguments in (
        ("masked_linear", (t.x, t.weight, t.scores, threshold, t.bias, mode)),
        ("masked_linear_packed", (t.x, t.weight, packed, None)),
        ("masked_linear_backward", arguments_of_backward(t, threshold, mode, [True, False, False, False])),
        (
            "masked_linear_packed_backward",
            (t.grad_output, t.x, t.weight, packed, None, signs, mode, [True, False, False, False]),
        ),
    ):
        through_scratch = partial(getattr(flat, op), choose=ops.always_scratch)
        entries = launches_of(lambda run=through_scratch, arguments=arguments: run(*arguments))
        assert [entry.kernel.__name__ for entry in entries] == ["_masked_weight_kernel"]
        assert_equals_reference(op, *arguments, choose=ops.always_scratch)
