"""Tiles of the matrix kernels: they meet without a seam, their sums in parts are whole, and come as the plan says.

As in test_matrix_kernels.py, inputs are small integers, and results are compared bit for bit with the reference's.
"""

from dataclasses import replace

import pytest
import torch
from exact import (
    ALL,
    ARITHMETIC,
    HALF,
    arguments_of_backward,
    assert_equals_reference,
    bits_of,
    integers,
    launches_of,
    threshold_of,
)

from mft_kernels.backends.triton import ops
from mft_kernels.backends.triton.product import new_parts, sum_splits
from mft_kernels.backends.triton.target import assume, interpreting
from mft_kernels.by_name import ByName
from mft_kernels.testing import Inputs, random_inputs

flat = ByName(ops)


@pytest.fixture(params=ARITHMETIC)
def dtype(request):
    """The dtype of activations and weight, under PyTorch's precision for fp32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if request.param == "tf32" else "highest")
    yield torch.float32 if request.param in ("ieee", "tf32") else getattr(torch, request.param)
    torch.set_float32_matmul_precision(before)


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


def test_a_sum_in_parts_counts_every_element_and_the_bias_once(device, target):
    # A few short of 26 steps of 128: the parts are of unequal length and the last step is short.
    long = 3304
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
            entries = launches_of(lambda op=op, arguments=arguments: getattr(flat, op)(*arguments))
            assert "_sum_splits_kernel" in [entry.kernel.__name__ for entry in entries]
            assert_equals_reference(op, *arguments)
        t, _ = forward()
        packed, _ = bits_of(t.scores, some, "magnitude")
        assert_equals_reference("masked_linear_packed", t.x, t.weight, packed, t.bias)


def test_two_parts_larger_than_a_block_are_summed_whole(device):
    bias, out = torch.arange(300.0, device=device), torch.empty(5, 300, device=device)
    parts = new_parts(out, 2, 5, 300)
    parts.copy_(torch.arange(3000.0, device=device).view(2, 5, 300))
    sum_splits(parts, bias, out)
    assert torch.equal(out, parts.sum(0) + bias)


@pytest.mark.parametrize(("m", "count"), [(513, 1), (512, 2)])
def test_one_launch_or_two_make_d_x_and_d_scores(device, target, m, count, monkeypatch):
    monkeypatch.setattr(ops, "one_launch", lambda *sizes: count == 1)
    t = integers(device, m, 16, 8, HALF)
    arguments = arguments_of_backward(t, threshold_of(t.scores))
    with assume(replace(target, multiprocessors=1)):
        assert len(launches_of(lambda: flat.masked_linear_backward(*arguments))) == count
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
            (entry,) = launches_of(lambda op=op, arguments=arguments: getattr(flat, op)(*arguments))
            assert entry.options["DESCRIPTORS"] == (described and target.descriptors)
            assert_equals_reference(op, *arguments)


def test_repeated_calls_give_the_same_bits(device, target):
    times = 3 if interpreting() else 100
    t = random_inputs(5, 8, 264, HALF, torch.bfloat16)
    t = Inputs(*(value.to(device) for value in vars(t).values()))
    threshold = threshold_of(t.scores, 0.02)
    with assume(replace(target, multiprocessors=20)):
        first = None
        for _ in range(times):
            y = flat.masked_linear(t.x, t.weight, t.scores, threshold, t.bias, "magnitude")
            results = (y, *flat.masked_linear_backward(*arguments_of_backward(t, threshold)))
            first = results if first is None else first
            for one, other in zip(first, results):
                assert torch.equal(one, other)
