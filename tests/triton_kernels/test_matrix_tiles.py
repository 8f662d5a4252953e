"""Tiles of the matrix kernels: they meet without a seam, sums in parts are complete, and launches follow the plan.

In the interpreter they take the form and tiles of each card, on a GPU its own. tests/ops checks that the results are
the reference's, whatever the operands.
"""

from dataclasses import replace

import pytest
import torch
from by_name import oracle
from exact import HALF, assert_op_equals_reference, flat, launches_of
from products import (
    ALL,
    D_X,
    MODES,
    Operands,
    assert_same,
    integers,
    row_thresholds,
)

from mft_kernels import reference
from mft_kernels.backends.triton import ops
from mft_kernels.backends.triton.target import assume
from mft_kernels.testing import integer_inputs

BF16 = torch.bfloat16


# Kinds that shared memory, tensor cores and the tables of tiles distinguish. "tf32" is fp32 with PyTorch's setting.
@pytest.fixture(params=["ieee", "tf32", "bfloat16", "float16"])
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
        o = integers(*shape, dtype=dtype, scores_dtype=BF16, device=device)
        with assume(replace(target, multiprocessors=1)):
            assert_op_equals_reference("masked_linear", *o.forward)
            # Of few rows in one launch, of 129 in two, and of 33 in either.
            every = [ALL] * (shape[0] != 129) + [D_X, [False, True, True, False]] * (shape[0] in (33, 129))
            for wanted in every:
                assert_op_equals_reference("masked_linear_backward", *o.backward(wanted))
            if shape[0] in (33, 65):
                assert_op_equals_reference("masked_linear_packed", o.x, o.weight, o.packed, o.bias)
                given = (o.grad_output, o.x, o.weight, o.packed, None, o.signs, o.mode, ALL)
                assert_op_equals_reference("masked_linear_packed_backward", *given)


def test_a_sum_in_parts_counts_every_element_and_the_bias_once(device, target):
    """A few elements less than 26 steps of 128: the parts differ in length and the last step is short."""
    of_k, of_n = (integers(5, *sizes, dtype=HALF, device=device) for sizes in ((8, 3304), (3304, 8)))
    with assume(replace(target, multiprocessors=1000)):
        for op, arguments in (
            ("masked_linear", of_k.forward),
            ("masked_linear_packed", (of_k.x, of_k.weight, of_k.packed, of_k.bias)),
            ("masked_linear_backward", of_n.backward(D_X)),
            ("masked_linear_backward", of_n.backward(ALL)),
        ):
            assert "_sum_splits_kernel" in [entry.kernel.__name__ for entry in launches_of(op, *arguments)]
            assert_op_equals_reference(op, *arguments)


def test_a_sum_in_parts_counts_every_element_and_the_bias_once_for_many_masks(device, target):
    for rows in (3, 20):  # tiles of 16 and of 64 tokens, with two tokens per row
        t = integer_inputs(2 * rows, 24, 1640, HALF)
        masks = [reference.pack_bits(t.scores.roll(shift) >= 2) for shift in range(3)]
        tasks = torch.arange(rows, dtype=torch.int32) * 7 % 4 - 1
        tasks[0] = 3  # an unknown task in every part: three masks use a binary for four
        x = t.x.view(rows, 2, 1640)
        there = (x.to(device), t.weight.to(device), [m.to(device) for m in masks], tasks.to(device), t.bias.to(device))
        with assume(replace(target, multiprocessors=1000)):
            names = [one.kernel.__name__ for one in launches_of("masked_linear_many", *there)]
            assert names == ["_many_masks_kernel", "_sum_splits_kernel"]
            y = flat.masked_linear_many(*there)
        assert_same(y[1:], oracle.masked_linear_many(x, t.weight, masks, tasks, t.bias)[1:])
        assert y[0].isnan().all()


@pytest.mark.parametrize("mode", MODES)
def test_each_row_of_a_later_tile_has_its_own_threshold(device, target, mode):
    n = 70 if target.backend == "interpreter" else 141  # more than a tile
    t = integer_inputs(17, n, 40, HALF, BF16)
    o = Operands.of(t, row_thresholds(t), mode).to(device)
    with assume(replace(target, multiprocessors=1)):
        assert_op_equals_reference("masked_linear", *o.forward)
        assert_op_equals_reference("masked_linear", *o.forward, choose=ops.always_scratch)
        assert_op_equals_reference("masked_linear_backward", *o.backward(D_X))
        assert_op_equals_reference("masked_linear_backward", *o.backward(ALL))


def test_x_is_not_read_where_no_weight_or_score_asks_for_a_gradient(device, target):
    o = integers(20, 40, 72, dtype=HALF, device=device)
    o = replace(o, x=o.grad_output)  # which does not fit
    assert_op_equals_reference("masked_linear_backward", *o.backward([True, False, False, True]))


@pytest.mark.parametrize(("m", "count"), [(513, 1), (512, 2)])
def test_one_launch_or_two_make_d_x_and_d_scores(device, target, m, count, monkeypatch):
    monkeypatch.setattr(ops, "one_launch", lambda *sizes: count == 1)
    given = integers(m, 16, 8, dtype=HALF, device=device).backward(ALL)
    with assume(replace(target, multiprocessors=1)):
        assert len(launches_of("masked_linear_backward", *given)) == count
        assert_op_equals_reference("masked_linear_backward", *given)


@pytest.mark.parametrize("described", [True, False])
def test_tiles_come_through_descriptors_where_tma_can_read_and_else_through_pointers(device, target, described):
    """Rows that are multiples of 16 bytes, or not, in a tensor that is read in tiles."""
    o = integers(17, 40, 72, dtype=HALF, scores_dtype=BF16, device=device)
    if not described:
        o = replace(o, weight=torch.cat([o.weight, o.weight[:, :1]], 1)[:, :72])
    with assume(replace(target, multiprocessors=1)):
        for op, arguments in (("masked_linear", o.forward), ("masked_linear_backward", o.backward(ALL))):
            (entry,) = launches_of(op, *arguments)
            assert entry.options["DESCRIPTORS"] == (described and target.descriptors)
            assert_op_equals_reference(op, *arguments)
