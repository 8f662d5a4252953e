"""Tests specific to the register-fed wgmma kernels, in the emulator: rings, clusters, TMA, sums in parts, schedules.

tests/ops checks that their results are the reference's, whatever the values.
"""

import itertools
from functools import partial

import emulated
import pytest
import torch
from checked_products import assert_one_product_in_every_schedule, check_products
from guarded import guarded
from in_turn import in_turn
from products import D_X, MODES, row_thresholds

from mft_kernels import reference
from mft_kernels.testing import integer_inputs, random_inputs

BF16, FP16 = torch.bfloat16, torch.float16
slow = partial(pytest.param, marks=pytest.mark.slow)  # takes seconds in the emulator


def check(*shape: int, dtype: torch.dtype = FP16, mode: str = "magnitude", **device) -> None:
    t = integer_inputs(*shape, dtype, dtype)
    check_products(t, torch.tensor(2.0 if mode == "magnitude" else -1.0, dtype=dtype), mode, arch="sm_90", **device)


@pytest.mark.parametrize(
    ("timing", "dtype", "mode"),
    in_turn([(0, "at_issue"), (1, "as_late_as_possible"), (2, "random"), (3, "random")], [BF16, FP16] * 2, MODES * 2),
)
def test_results_are_exact_however_the_background_work_is_timed(timing, dtype, mode):
    emulated.set_settings(*timing)
    check(40, 256, 256, dtype=dtype, mode=mode)


@pytest.mark.parametrize(("tokens", "multiprocessors"), [(70, 2), (70, 6), (130, 4), slow(300, 2), slow(300, 6)])
def test_every_tile_is_made_once_by_any_number_of_clusters(tokens, multiprocessors):
    """The ring continues from tile to tile: there are more steps than stages."""
    check(tokens, 520, 640, multiprocessors=multiprocessors)


@pytest.mark.parametrize(("m", "n", "k"), [(1, 8, 8), (5, 128, 128), (64, 136, 72), (65, 264, 200), (33, 8, 1000)])
def test_edges_are_cut_and_filled_with_zeros(m, n, k):
    check(m, n, k)


def test_nothing_outside_of_the_inputs_is_read():
    """TMA knows the sizes; threads read thresholds and bias, some of them beyond the last row."""
    t = integer_inputs(40, 200, 128, FP16, FP16)
    for name, tensor in vars(t).items():
        setattr(t, name, guarded(tensor))
    check_products(t, guarded(row_thresholds(t)), "magnitude", arch="sm_90")


def test_what_it_does_not_take_is_refused_by_name():
    t = integer_inputs(8, 64, 96, FP16, FP16)
    two, packed = torch.tensor(2.0).half(), reference.pack_mask(t.scores, torch.tensor(2.0).half(), "magnitude")
    with pytest.raises(RuntimeError, match="the packed mask's rows must begin at multiples of 16 bytes"):
        emulated.masked_linear_packed(t.x, t.weight, packed, None, arch="sm_90")
    for name in ("weight", "x", "scores"):
        tensors = {"x": t.x, "weight": t.weight, "scores": t.scores}
        tensors[name] = torch.zeros(len(tensors[name]), 97).half()[:, :96]
        with pytest.raises(RuntimeError, match="must begin at multiples of 16 bytes, got a stride of 194"):
            emulated.masked_linear(*tensors.values(), two, None, "magnitude", arch="sm_90")
    rows = (t.weight, t.scores, row_thresholds(t), "magnitude", D_X)
    with pytest.raises(RuntimeError, match="thresholds by row must be packed"):
        emulated.masked_linear_backward(t.grad_output, t.x, *rows, arch="sm_90")


# --------------------------------------------------------------------------------------------------------- in parts


@pytest.mark.parametrize(
    ("shape", "multiprocessors", "expected"),
    [
        slow((33, 264, 1096), 132, {(64, 3), (64, 1)}),  # 9 pairs of steps; d_x has 3, in one part
        ((64, 1032, 1256), 132, {(64, 4), (64, 3)}),  # 10 pairs in parts of 3, the last has one; d_x has 9
        slow((1, 264, 4352), 6, {(64, 3), (64, 1)}),  # more tiles than clusters: rings continue from part to part
        ((70, 264, 1256), 16, {(128, 4), (128, 1)}),
        ((130, 264, 1256), 16, {(256, 4), (256, 1), (64, 1)}),
    ],
)
def test_sums_in_parts_are_exact(shape, multiprocessors, expected, ways):
    check(*shape, multiprocessors=multiprocessors)
    assert {*ways} == expected


@pytest.mark.parametrize("at_end", [False, True])
def test_parts_write_nothing_around_their_workspace(at_end, ways):
    with emulated.outputs_at_guard_pages(at_end=at_end):
        check(33, 264, 1096, multiprocessors=132)
    assert {*ways} == {(64, 3), (64, 1)}


@pytest.mark.parametrize("transposed", [False, True])
def test_parts_are_added_in_one_order_and_rounded_once(transposed, ways):
    t = random_inputs(20, 1032, 1096, BF16, BF16)
    assert_one_product_in_every_schedule(t, transposed=transposed, arch="sm_90", multiprocessors=132)
    assert {*ways} == {(64, 3)}


@pytest.mark.usefixtures("without_a_workspace")
def test_without_a_workspace_the_sum_is_in_one():
    check(33, 264, 1096, multiprocessors=132)


@pytest.mark.slow
def test_many_schedules_give_one_result():
    for settings in itertools.product(range(3), emulated.ASYNCHRONIES, emulated.SCHEDULES):
        emulated.set_settings(*settings)
        check(130, 256, 384, multiprocessors=2)
