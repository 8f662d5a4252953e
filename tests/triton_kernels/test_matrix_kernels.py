"""The matrix kernels equal the reference: in the interpreter with the form and tiles of each card, or on a GPU.

Inputs are small integers: sums are exact in any order, so results compare bit for bit and a tile that is dropped,
taken twice or taken from elsewhere is seen. The reference always runs on the CPU.
"""

import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from mft_kernels import reference
from mft_kernels.testing import Inputs, assert_within_budget, integer_inputs, random_inputs
from mft_kernels.triton import ops
from mft_kernels.triton.launch import launch, record
from mft_kernels.triton.target import assume, interpreting

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MODES = ("magnitude", "value")
ALL = [True, True, True, True]
HALF = torch.float16
#: What shared memory, tensor cores and the tables of tiles tell apart. "tf32" is fp32 with that setting of PyTorch.
ARITHMETIC = ("ieee", "tf32", "bfloat16", "float16")


def assert_same(got, expected):
    """Equal in dtype, shape and every element (NaN equals NaN), expected being exact."""
    got = got.cpu()
    assert got.dtype == expected.dtype
    assert got.shape == expected.shape
    if expected.dtype == torch.bfloat16 and expected.isfinite().any():
        assert expected[expected.isfinite()].abs().max() <= 256, "inputs too large for an exact comparison"
    assert torch.equal(got.nan_to_num(12345), expected.nan_to_num(12345)), (got - expected).abs().max()


def assert_equals_reference(op, *arguments, **options):
    """The op of this name on these arguments, against the reference on the CPU."""
    on_cpu = [a.cpu() if isinstance(a, torch.Tensor) else a for a in arguments]
    if op == "accumulate_score_grad":
        expected = (on_cpu[0].clone(), *on_cpu[1:])
        reference.accumulate_score_grad(*expected)
        ops.accumulate_score_grad(*arguments)
        assert_same(arguments[0], expected[0])
        return
    got, expected = getattr(ops, op)(*arguments, **options), getattr(reference, op)(*on_cpu)
    for g, e in zip(got, expected) if isinstance(got, tuple) else [(got, expected)]:
        assert_same(g, e)


def integers(device, *shape_and_dtypes, seed=0):
    """integer_inputs on the device, and no score is 0, so that sign bits say the same as scores."""
    t = integer_inputs(*shape_and_dtypes, seed=seed)
    t.scores[t.scores == 0] = 3
    return Inputs(*(value.to(device) for value in vars(t).values()))


def bits_of(scores, threshold, mode):
    """(packed mask, sign bits) on the device of scores."""
    packed = reference.pack_mask(scores.cpu(), threshold.cpu(), mode)
    return packed.to(scores.device), reference.pack_signs(scores.cpu())[0].to(scores.device)


def assert_every_op_equals_reference(t, threshold, mode):
    """Forward and backward from scores and from bits, each kind of sign, and accumulation."""
    assert_equals_reference("masked_linear", t.x, t.weight, t.scores, threshold, t.bias, mode)
    assert_equals_reference("masked_linear_backward", *arguments_of_backward(t, threshold, mode))
    packed, signs = bits_of(t.scores, threshold, mode)
    assert_equals_reference("masked_linear_packed", t.x, t.weight, packed, None)
    arguments = (t.grad_output, t.x, t.weight, packed, None, signs, mode, ALL)
    assert_equals_reference("masked_linear_packed_backward", *arguments)
    out = torch.ones(t.scores.shape, dtype=t.scores.dtype, device=t.scores.device)
    assert_equals_reference("accumulate_score_grad", out, t.grad_output, t.x, t.weight, t.scores, None, mode)


def threshold_of(scores, value=2.0):
    return torch.tensor(value, dtype=scores.dtype, device=scores.device)


def arguments_of_backward(t, threshold, mode="magnitude", output_mask=ALL):
    return t.grad_output, t.x, t.weight, t.scores, threshold, mode, output_mask


def launches_of(function):
    with record() as launches:
        function()
    return launches


@pytest.fixture(params=ARITHMETIC)
def dtype(request):
    """The dtype of activations and weight, under PyTorch's precision for fp32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if request.param == "tf32" else "highest")
    yield torch.float32 if request.param in ("ieee", "tf32") else getattr(torch, request.param)
    torch.set_float32_matmul_precision(before)


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


def test_tiles_meet_without_a_seam(device, target, dtype, request):
    arithmetic = request.node.callspec.params["dtype"]
    # One multiprocessor: its few programs walk over all tiles, which are the largest of the card.
    if target.backend == "interpreter" or arithmetic == "ieee":
        shapes = [(1, 70, 72), (17, 35, 72), (33, 72, 35)]  # tiles up to 64 x 64
    elif arithmetic == "float16":
        shapes = [(1, 72, 136), (16, 24, 40), (17, 136, 72), (64, 24, 40), (65, 136, 136), (129, 72, 264)]
        shapes += [(257, 136, 8)]
    else:
        shapes = [(65, 131, 133)] if arithmetic == "bfloat16" else [(65, 136, 152)]
    for shape in shapes:
        t = integers(device, *shape, dtype, torch.bfloat16, seed=shape[0])
        threshold = threshold_of(t.scores)
        packed, signs = bits_of(t.scores, threshold, "magnitude")
        with assume(replace(target, multiprocessors=1)):
            assert_equals_reference("masked_linear", t.x, t.weight, t.scores, threshold, t.bias, "magnitude")
            if shape[0] != 129:
                assert_equals_reference("masked_linear_backward", *arguments_of_backward(t, threshold))
            if shape[0] in (33, 65):
                assert_equals_reference("masked_linear_packed", t.x, t.weight, packed, t.bias)
                arguments = (t.grad_output, t.x, t.weight, packed, None, signs, "magnitude", ALL)
                assert_equals_reference("masked_linear_packed_backward", *arguments)
            if shape[0] in (33, 129):  # not in one launch
                for wanted in ([True, False, False, False], [False, True, True, False]):
                    arguments = arguments_of_backward(t, threshold, output_mask=wanted)
                    assert_equals_reference("masked_linear_backward", *arguments)


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
    d_x, _, _, d_bias = ops.masked_linear_backward(*arguments, [True, False, False, True])
    expected = reference.masked_linear_backward(*(a.cpu() for a in arguments[:-1]), "value", [True, False, False, True])
    assert_same(d_x, expected[0])
    assert_same(d_bias, expected[3])


@pytest.mark.parametrize(("dtype", "out_dtype"), [*zip(DTYPES, DTYPES), (HALF, torch.float32), (torch.float32, HALF)])
def test_accumulation_adds_to_what_lies_there_in_every_dtype(device, target, dtype, out_dtype):
    t = integers(device, 17, 37, 40, dtype, torch.float32)
    signs = bits_of(t.scores, threshold_of(t.scores), "magnitude")[1]
    out = (torch.arange(37 * 40).view(37, 40) % 7).to(device, out_dtype)
    for sign in ((t.scores, None, "magnitude"), (None, signs, "magnitude"), (None, None, "value")):
        assert_equals_reference("accumulate_score_grad", out, t.grad_output, t.x, t.weight, *sign)


def test_accumulation_rounds_the_sum_alone(device, target):
    # Near 2048 fp16 holds even numbers: 2049.0005 rounds up to 2050. A term rounded first is 1, and 2049 goes to 2048.
    x = torch.tensor([[1.0], [2.0**-11]], dtype=HALF, device=device).expand(2, 40)
    ones = torch.ones(40, 40, dtype=HALF, device=device)
    out = 2048 * ones
    ops.accumulate_score_grad(out, ones[:2], x, ones, None, None, "value")
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
    assert_same(ops.masked_linear(t.x, t.weight, t.scores, threshold, t.bias, "magnitude", choose=choose), y)
    assert_same(ops.masked_linear_packed(t.x, t.weight, packed, t.bias, choose=choose), y)
    assert_same(ops.masked_linear_packed(t.x, t.weight, packed, None, choose=choose), torch.zeros_like(y))
    for gradients in (
        ops.masked_linear_backward(*arguments_of_backward(t, threshold), choose=choose),
        ops.masked_linear_packed_backward(
            t.grad_output, t.x, t.weight, packed, t.scores, signs, "magnitude", ALL, choose=choose
        ),
    ):
        assert_same(gradients[0], torch.zeros(m, k, dtype=HALF))
        assert_same(gradients[1], torch.zeros(n, k, dtype=HALF))
        assert_same(gradients[2], torch.zeros(n, k))
        assert_same(gradients[3], t.grad_output.cpu().sum(0))
    ops.accumulate_score_grad(t.scores, t.grad_output, t.x, t.weight, None, signs, "magnitude")


def test_a_sum_in_parts_counts_every_element_and_the_bias_once(device, target):
    # A few short of 13 steps of 64: the parts are of unequal length and the last step is short.
    long = 824
    some = threshold_of(torch.empty(0, device=device))

    def forward():
        t = integers(device, 5, 8, long, HALF)
        return t, (t.x, t.weight, t.scores, some, t.bias, "magnitude")

    def d_x(output_mask):
        t = integers(device, 5, long, 8, HALF)
        return t, (t.grad_output, t.x, t.weight, t.scores, some, "magnitude", output_mask)

    with assume(replace(target, multiprocessors=1000)):
        for op, (_, arguments) in (
            ("masked_linear", forward()),
            ("masked_linear_backward", d_x([True, False, False, False])),
            ("masked_linear_backward", d_x(ALL)),
        ):
            entries = launches_of(lambda op=op, arguments=arguments: getattr(ops, op)(*arguments))
            assert entries[0].options["SPLITS"] > 1
            assert "_sum_splits_kernel" in [entry.kernel.__name__ for entry in entries]
            assert_equals_reference(op, *arguments)
        t, _ = forward()
        packed, _ = bits_of(t.scores, some, "magnitude")
        assert_equals_reference("masked_linear_packed", t.x, t.weight, packed, t.bias)


@pytest.mark.parametrize(("m", "count"), [(512, 1), (513, 2)])
def test_up_to_512_tokens_one_launch_makes_d_x_and_d_scores_and_then_two(device, target, m, count):
    t = integers(device, m, 16, 8, HALF)
    arguments = arguments_of_backward(t, threshold_of(t.scores))
    with assume(replace(target, multiprocessors=1)):
        assert len(launches_of(lambda: ops.masked_linear_backward(*arguments))) == count
        assert_equals_reference("masked_linear_backward", *arguments)


@pytest.mark.parametrize("described", [True, False])
def test_tiles_come_through_descriptors_where_tma_can_read_and_else_through_pointers(device, target, described):
    # Rows of 16 bytes' multiples against one that is no multiple, in each tensor that is read in tiles.
    t = integers(device, 17, 40, 72, HALF, torch.bfloat16)
    if not described:
        t.weight = torch.cat([t.weight, t.weight[:, :1]], 1)[:, :72]
    threshold = threshold_of(t.scores)
    forward = (t.x, t.weight, t.scores, threshold, t.bias, "magnitude")
    backward = (t.grad_output, t.x, t.weight, t.scores, threshold, "magnitude", ALL)
    with assume(replace(target, multiprocessors=1)):
        for op, arguments in (("masked_linear", forward), ("masked_linear_backward", backward)):
            (entry,) = launches_of(lambda op=op, arguments=arguments: getattr(ops, op)(*arguments))
            assert entry.options["DESCRIPTORS"] == (described and target.descriptors)
            assert_equals_reference(op, *arguments)


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
    assert ops.masked_linear(*forward).isfinite().all()
    assert ops.masked_linear_backward(*backward)[0].isfinite().all()
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
    d_scores = ops.masked_linear_backward(*arguments_of_backward(t, threshold, "magnitude"))[2]
    assert (d_scores[:, ::3] == 0).all()
    assert (d_scores[:, 1::3] == 0).all()


def column_major(value):
    return value.T.contiguous().T


def every_second_column(value):
    return torch.stack([value, torch.full_like(value, torch.nan)], 2).flatten(1)[:, ::2]


def every_second_row(value):
    return torch.stack([value, torch.full_like(value, torch.nan)], 1).flatten(0, 1)[::2]


def misaligned(value):
    return (
        torch.full((value.numel() + 1,), torch.nan, dtype=value.dtype, device=value.device)[1:]
        .view_as(value)
        .copy_(value)
    )


def inside_a_larger_one(value):
    """Rows and columns within a larger matrix of NaN, at an odd offset and with an odd pitch."""
    rows, columns = value.shape
    around = torch.full((rows + 2, columns + 5), torch.nan, dtype=value.dtype, device=value.device)
    return around[1:-1, 3:-2].copy_(value)


LAYOUTS = (column_major, every_second_column, every_second_row, misaligned, inside_a_larger_one)


@pytest.mark.parametrize("shift", range(len(LAYOUTS)))
def test_any_layouts_are_read_as_they_are(device, target, shift):
    # Each tensor meets each layout, and no two tensors have the same.
    t = integers(device, 18, 24, 40, HALF, torch.bfloat16)
    names = ("x", "weight", "scores", "grad_output")
    views = replace(t, **{n: LAYOUTS[(i + shift) % len(LAYOUTS)](getattr(t, n)) for i, n in enumerate(names)})
    assert_every_op_equals_reference(views, threshold_of(t.scores), "magnitude")
    arguments = (views.x, views.weight, views.scores, threshold_of(t.scores), None, "magnitude")
    assert_equals_reference("masked_linear", *arguments, choose=ops.always_scratch)


def test_expanded_inputs_are_read_as_they_are(device, target):
    t = integers(device, 18, 24, 40, HALF, torch.bfloat16)
    one = torch.ones((), dtype=HALF, device=device)
    for views in (
        replace(t, grad_output=one.expand(18, 24)),  # what y.sum().backward() sends
        replace(t, x=t.x[:1].expand(18, 40), scores=t.scores[:, :1].expand(24, 40)),
        replace(t, x=t.x[:, :1].expand(18, 40), weight=t.weight[:1].expand(24, 40)),
    ):
        threshold = threshold_of(t.scores)
        arguments = (views.x, views.weight, views.scores, threshold, None, "magnitude")
        assert_equals_reference("masked_linear", *arguments)
        assert_equals_reference("masked_linear", *arguments, choose=ops.always_scratch)
        assert_equals_reference("masked_linear_backward", *arguments_of_backward(views, threshold))


def test_packed_words_may_have_strides(device, target):
    t = integers(device, 6, 24, 72, HALF)
    packed, signs = bits_of(t.scores, threshold_of(t.scores), "magnitude")
    packed, signs = column_major(packed), column_major(signs)
    assert_equals_reference("masked_linear_packed", t.x, t.weight, packed, t.bias)
    arguments = (t.grad_output, t.x, t.weight, packed, None, signs, "magnitude", ALL)
    assert_equals_reference("masked_linear_packed_backward", *arguments)


@pytest.mark.parametrize("leading", [(), (1,), (2, 1, 3), (2, 0, 3)])
def test_x_may_have_any_number_of_leading_axes(device, leading):
    m = torch.Size(leading).numel()
    t = integers(device, m, 24, 40, HALF)
    views = replace(t, x=t.x.view(*leading, 40), grad_output=t.grad_output.view(*leading, 24))
    assert_every_op_equals_reference(views, threshold_of(t.scores), "magnitude")
    if len(leading) == 3:  # and where no view makes one axis of them
        views = replace(t, x=views.x.transpose(0, 2), grad_output=views.grad_output.transpose(0, 2))
        assert_every_op_equals_reference(views, threshold_of(t.scores), "magnitude")


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
        got = getattr(ops, op)(*(a.to(device) for a in arguments), *rest)
        same = getattr(reference, op)(*arguments, *rest)
        exact = getattr(reference, op)(*(a.double() for a in arguments), *rest)
        for g, s, e in zip(got, same, exact) if isinstance(got, tuple) else [(got, same, exact)]:
            if g.numel():
                assert_within_budget(g.cpu(), s, e)


def test_repeated_calls_give_the_same_bits(device, target):
    times = 3 if interpreting() else 100
    t = random_inputs(5, 8, 264, HALF, torch.bfloat16)
    t = Inputs(*(value.to(device) for value in vars(t).values()))
    threshold = threshold_of(t.scores, 0.02)
    with assume(replace(target, multiprocessors=20)):
        first = None
        for _ in range(times):
            y = ops.masked_linear(t.x, t.weight, t.scores, threshold, t.bias, "magnitude")
            results = (y, *ops.masked_linear_backward(*arguments_of_backward(t, threshold)))
            first = results if first is None else first
            for one, other in zip(first, results):
                assert torch.equal(one, other)


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
        through_scratch = partial(getattr(ops, op), choose=ops.always_scratch)
        entries = launches_of(lambda run=through_scratch, arguments=arguments: run(*arguments))
        assert [entry.kernel.__name__ for entry in entries] == ["_masked_weight_kernel"]
        assert_equals_reference(op, *arguments, choose=ops.always_scratch)


def far_apart(value, axis):
    """The value as a view whose last index on the axis lies beyond 2^31 elements; memory between is not touched."""
    stride = 2**31 // (value.shape[axis] - 1) // 8 * 8 + 8
    strides = (stride, 1) if axis == 0 else (1, stride)
    elements = 1 + sum((size - 1) * step for size, step in zip(value.shape, strides))
    return torch.empty(elements, dtype=value.dtype, device=value.device).as_strided(value.shape, strides).copy_(value)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("name", ["x", "weight", "scores", "grad_output"])
def test_elements_beyond_2_to_the_31_are_read(device, target, name, axis):
    t = integers(device, 9, 16, 24, HALF, HALF)
    t = replace(t, **{name: far_apart(getattr(t, name), axis)})
    threshold = threshold_of(t.scores)
    arguments = (t.x, t.weight, t.scores, threshold, t.bias, "magnitude")
    assert_equals_reference("masked_linear", *arguments)
    assert_equals_reference("masked_linear", *arguments, choose=ops.always_scratch)
    assert_equals_reference("masked_linear_backward", *arguments_of_backward(t, threshold))


@pytest.mark.parametrize("axis", [0, 1])
def test_elements_beyond_2_to_the_31_are_written(device, target, axis):
    # The launch of a small product, with the result's strides replaced by those of a view that spans 2^31 elements.
    t = integers(device, 9, 40, 24, HALF)
    arguments = (t.x, t.weight, t.scores, threshold_of(t.scores), None, "magnitude")
    (entry,) = launches_of(lambda: ops.masked_linear(*arguments))
    out = far_apart(torch.zeros(9, 40, dtype=HALF, device=device), axis)
    places = [i for i, a in enumerate(entry.args) if isinstance(a, torch.Tensor) and a.shape == out.shape]
    assert len(places) == 1
    assert entry.args[-3:] == (9 * 40, 40, 1)
    args = (*entry.args[: places[0]], out, *entry.args[places[0] + 1 : -2], *out.stride())
    launch(entry.kernel, entry.grid, *args, **entry.options)
    assert_same(out, reference.masked_linear(*(a.cpu() if isinstance(a, torch.Tensor) else a for a in arguments)))


@pytest.mark.skipif(interpreting(), reason="2^31 results are too many for the interpreter")
def test_more_than_2_to_the_31_results_are_written(device):
    n, k = 2**16, 2**15 + 8
    t = integers(device, 16, n, 8, HALF)
    x = integer_inputs(16, 1, k, HALF).x.to(device)
    weight = torch.ones((), dtype=HALF, device=device).expand(n, k)
    out = torch.zeros(n, k, dtype=HALF, device=device)
    ops.accumulate_score_grad(out, t.grad_output, x, weight, None, None, "value")
    assert_same(out[-3:], t.grad_output[:, -3:].T.cpu() @ x.cpu())
    del out
    rows = torch.ones(k, 8, dtype=HALF, device=device)
    y = ops.masked_linear(rows, t.weight, t.scores, threshold_of(t.scores), None, "magnitude")
    expected = reference.masked_linear(
        rows[:1].cpu(), t.weight.cpu(), t.scores.cpu(), torch.tensor(2.0), None, "magnitude"
    )
    assert_same(y[-1:], expected)


@pytest.mark.skipif(not interpreting(), reason="the guard is a page of the CPU's memory")
def test_no_kernel_reads_or_writes_beyond_its_tensors():
    # In a process of its own, which such an access kills.
    script = Path(__file__).with_name("bounds.py")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}  # the package need not be installed
    run = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=environment)
    assert run.stdout == "within bounds\n", (run.returncode, run.stderr)
