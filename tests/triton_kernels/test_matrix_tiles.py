"""Tiles of the matrix kernels: they meet without a seam, sums in parts are complete, and launches follow the plan.

In the interpreter they take the form and tiles of each card, on a GPU its own. tests/ops checks that the results are
the reference's, whatever the operands.
"""

from dataclasses import replace

import pytest
import torch
from by_name import ByName, oracle
from exact import (
    ARITHMETIC,
    HALF,
    arguments_of_backward,
    assert_equals_reference,
    bits_of,
    integers,
    launches_of,
    threshold_of,
)
from products import ALL, MODES, assert_same

from mft_kernels.backends.triton import ops
from mft_kernels.backends.triton.target import assume

flat = ByName(ops)


@pytest.fixture(params=ARITHMETIC)
def dtype(request):
    """Yield the dtype of activations and weight, with PyTorch's precision for fp32 set."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if request.param == "tf32" else "highest")
    yield torch.float32 if request.param in ("ieee", "tf32") else getattr(torch, request.param)
    torch.set_float32_matmul_precision(before)


def test_tiles_meet_without_a_seam(device, target, dtype, request):
    arithmetic = request.node.callspec.params["dtype"]
    # With one multiprocessor, few programs walk over all tiles, and the tiles are the largest of the card.
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
            if shape[0] in (33, 129):  # in two launches
                for wanted in ([True, False, False, False], [False, True, True, False]):
                    arguments = arguments_of_backward(t, threshold, output_mask=wanted)
                    assert_equals_reference("masked_linear_backward", *arguments)


def test_a_sum_in_parts_counts_every_element_and_the_bias_once(device, target):
    # A few elements less than 26 steps of 128: the parts differ in length and the last step is short.
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


def test_a_sum_in_parts_counts_every_element_and_the_bias_once_for_many_masks(device, target):
    for rows in (3, 20):  # tiles of 16 and of 64 tokens, with two tokens per row
        t = integers(device, 2 * rows, 24, 1640, HALF)
        masks = [bits_of(t.scores.roll(shift), threshold_of(t.scores), "magnitude")[0] for shift in range(3)]
        tasks = (torch.arange(rows, dtype=torch.int32) * 7 % 4 - 1).to(device)
        tasks[0] = 3  # an unknown task in every part: three masks use a binary for four
        arguments = (t.x.view(rows, 2, 1640), t.weight, masks, tasks, t.bias)
        with assume(replace(target, multiprocessors=1000)):
            names = [
                one.kernel.__name__ for one in launches_of(lambda given=arguments: flat.masked_linear_many(*given))
            ]
            assert names == ["_many_masks_kernel", "_sum_splits_kernel"]
            y = flat.masked_linear_many(*arguments)
        on_cpu = (arguments[0].cpu(), t.weight.cpu(), [mask.cpu() for mask in masks], tasks.cpu(), t.bias.cpu())
        assert_same(y[1:], oracle.masked_linear_many(*on_cpu)[1:])
        assert y[0].isnan().all()


@pytest.mark.parametrize("mode", MODES)
def test_each_row_of_a_later_tile_has_its_own_threshold(device, target, mode):
    n = 70 if target.backend == "interpreter" else 141  # more than a tile
    t = integers(device, 17, n, 40, HALF, torch.bfloat16)
    thresholds = (torch.arange(n) % 6 - 1).to(device, torch.bfloat16)
    arguments = (t.x, t.weight, t.scores, thresholds, t.bias, mode)
    only_d_x = arguments_of_backward(t, thresholds, mode, [True, False, False, False])
    with assume(replace(target, multiprocessors=1)):
        assert_equals_reference("masked_linear", *arguments)
        assert_equals_reference("masked_linear", *arguments, choose=ops.always_scratch)
        assert_equals_reference("masked_linear_backward", *only_d_x)
        assert_equals_reference("masked_linear_backward", *arguments_of_backward(t, thresholds, mode))


def test_x_is_not_read_where_no_weight_or_score_asks_for_a_gradient(device, target):
    t = integers(device, 20, 40, 72, HALF)
    arguments = (t.grad_output, t.grad_output, t.weight, t.scores, threshold_of(t.scores), "value")
    d_x, _, _, d_bias = flat.masked_linear_backward(*arguments, [True, False, False, True])
    expected = oracle.masked_linear_backward(*(a.cpu() for a in arguments[:-1]), "value", [True, False, False, True])
    assert_same(d_x, expected[0])
    assert_same(d_bias, expected[3])


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
    # Rows that are multiples of 16 bytes, or not, in a tensor that is read in tiles.
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
