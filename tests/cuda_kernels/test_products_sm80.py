"""Tests specific to the sm_80 kernels, in the emulator: tiles, stages, alignment, sums in parts and schedules.

tests/ops checks that their results are the reference's, whatever the operands.
"""

from functools import partial

import emulated
import pytest
import torch
from by_name import oracle
from checked_products import (
    OnDevice,
    assert_one_product_in_every_schedule,
    assert_one_sum_in_every_schedule,
    check_products,
)
from host_program import built, run
from in_turn import in_turn
from products import ALL, MODES, Operands, assert_same, before, every_sum, row_thresholds, within
from torch import Tensor

from mft_kernels import reference
from mft_kernels.testing import Inputs, integer_inputs, random_inputs

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = (BF16, FP16)
SCORES = (FP32, BF16, FP16)
BOTH = [False, True, True, False]  # d_weight and d_scores
slow = partial(pytest.param, marks=pytest.mark.slow)  # takes seconds in the emulator


@pytest.fixture(autouse=True)
def general(monkeypatch):
    """Use the general kernel where few tokens would go to decode_sm80, which test_decode.py tests."""
    monkeypatch.setattr(emulated, "usual_arch", "general")


def check_score_grad(t: Inputs, threshold: Tensor, mode: str, **device) -> None:
    """Check d_weight and d_scores, together and separately, by scores and by packed mask, and added to a buffer."""
    o, by = Operands.of(t, threshold, mode), OnDevice(**device)
    for wanted in (BOTH, [False, True, False, False], [False, False, True, False]):
        check_gradients(by, "masked_linear_backward", *o.backward(wanted))
    for signs in (o.signs, None):
        given = (t.grad_output, t.x, t.weight, o.packed, t.scores, signs, mode, ALL)
        check_gradients(by, "masked_linear_packed_backward", *given)
    check_sums(o, by)


def check_sums(o: Operands, by: OnDevice) -> None:
    for dtype in SCORES:
        sums, expected = (every_sum(each, o, before(o, dtype)) for each in (by, oracle))
        for (name, got), (_, right) in zip(sums, expected, strict=True):
            assert_same(got, right, name)


def check_gradients(by: OnDevice, op: str, *arguments) -> None:
    for got, right in zip(getattr(by, op)(*arguments), getattr(oracle, op)(*arguments), strict=True):
        assert_same(got, right)


def parts_of(ways) -> set[int]:
    return {parts for _, parts in ways}


# ------------------------------------------------------------------------------------------------- every kernel once


@pytest.mark.parametrize(
    ("sized", "dtype", "scores_dtype", "mode"),
    in_turn([((33, 136, 160), 64), ((130, 72, 264), 128), ((35, 45, 131), 128)], DTYPES, SCORES, MODES),
)
def test_products_equal_the_reference(sized, dtype, scores_dtype, mode, ways):
    shape, tokens = sized
    t = integer_inputs(*shape, dtype, scores_dtype)
    check_products(t, torch.tensor(2.0, dtype=scores_dtype), mode, multiprocessors=2)
    check_products(t, row_thresholds(t), mode, multiprocessors=2)
    assert {*ways} == {(tokens, 1)}


@pytest.mark.parametrize("scores_dtype", [FP32, BF16])
@pytest.mark.parametrize("shared_kib", [100, 164, 228])
def test_as_many_stages_as_a_gpu_has_room_for_give_the_same(shared_kib, scores_dtype, ways):
    t = integer_inputs(70, 136, 264, BF16, scores_dtype)  # 5 and 9 steps: more than there are stages
    threshold = torch.tensor(2.0, dtype=scores_dtype)
    expected = oracle.masked_linear(t.x, t.weight, t.scores, threshold, t.bias, "magnitude")
    packed = reference.pack_mask(t.scores, threshold, "magnitude")
    for x, rows in ((t.x, slice(None)), (t.x[:33], slice(33))):  # tiles of 128 and of 64 tokens
        device = {"shared_bytes": shared_kib * 1024, "multiprocessors": 1}
        assert_same(
            emulated.masked_linear(x, t.weight, t.scores, threshold, t.bias, "magnitude", **device), expected[rows]
        )
        assert_same(emulated.masked_linear_packed(x, t.weight, packed, t.bias, **device), expected[rows])
    assert [tokens for tokens, _ in ways] == [128, 128, 64, 64]


@pytest.mark.parametrize(
    ("shape", "dtype", "scores_dtype", "mode"),
    in_turn([(40, 136, 152), (131, 45, 33), (7, 5, 36)], DTYPES, SCORES, MODES),  # 36 leaves half of a group of eight
)
def test_score_gradients_equal_the_reference(shape, dtype, scores_dtype, mode):
    t = integer_inputs(*shape, dtype, scores_dtype)
    check_score_grad(t, torch.tensor(2.0, dtype=scores_dtype), mode)
    check_score_grad(t, row_thresholds(t), mode)


@pytest.mark.parametrize("shared_kib", [100, slow(164), 228])
def test_two_blocks_of_score_gradients_share_what_a_gpu_has(shared_kib):
    t = integer_inputs(200, 136, 264, BF16, BF16)  # 7 steps: more than there are stages
    check_score_grad(t, row_thresholds(t), "magnitude", shared_bytes=shared_kib * 1024)


# ------------------------------------------------------------------------------------------- shapes, rows, alignment


@pytest.mark.parametrize(
    "shape", [(64, 129, 31), (65, 8, 8), (129, 130, 128), (3, 24, 520), (5, 1, 1031), (128, 128, 32)]
)
def test_shapes_round_the_tiles(shape):
    t = integer_inputs(*shape, FP16, BF16)
    check_products(t, row_thresholds(t), "magnitude")
    check_score_grad(t, row_thresholds(t), "value")


@pytest.mark.parametrize("tokens", [1, slow(1200)])
def test_more_tiles_than_one_band(tokens):
    t = integer_inputs(tokens, 1160, 272, FP16, FP16)
    threshold = torch.tensor(1.0).half()
    expected = oracle.masked_linear(t.x, t.weight, t.scores, threshold, None, "value")
    assert_same(emulated.masked_linear(t.x, t.weight, t.scores, threshold, None, "value"), expected)
    if tokens == 1:
        check_score_grad(t, threshold, "value")


@pytest.mark.parametrize("name", ["x", "grad_output", "weight", "scores", "all"])
@pytest.mark.parametrize(("before", "more"), [(8, 8), (8, 16), (1, 8), (8, 1), (2, 6)])
def test_rows_of_any_alignment_and_stride(name, before, more):
    """Aligned rows, then each matrix alone at odd places; columns that are whole chunks and columns that are not."""
    for columns in (72, 70):
        t = integer_inputs(35, columns, columns, BF16, FP32 if before == 2 else BF16)
        for field in ("x", "grad_output", "weight", "scores") if name == "all" else (name,):
            tensor = getattr(t, field)
            setattr(t, field, within(tensor, before, columns + more))
        o = Operands.of(t, row_thresholds(t))
        check_products(t, o.threshold, "magnitude")
        check_gradients(OnDevice(), "masked_linear_backward", *o.backward(BOTH))
        check_sums(o, OnDevice())


@pytest.mark.parametrize(("before", "more"), [(0, 0), (8, 8), (1, 3)])
def test_strided_outputs_and_nothing_around_them_is_written(before, more):
    for out_dtype in SCORES:
        t = integer_inputs(9, 130, 40, BF16, BF16)
        out = within(torch.ones(130, 40, dtype=out_dtype), before, 40 + more)
        right = torch.ones(130, 40, dtype=out_dtype)
        memory = torch.tensor([], dtype=out_dtype).set_(out.untyped_storage())
        around = int(memory.isnan().sum())
        emulated.accumulate_score_grad(out, t.grad_output, t.x, t.weight, t.scores, None, "magnitude")
        oracle.accumulate_score_grad(right, t.grad_output, t.x, t.weight, t.scores, None, "magnitude")
        assert_same(out, right)
        emulated.accumulate_product(out, t.grad_output, t.x)
        oracle.accumulate_product(right, t.grad_output, t.x)
        assert_same(out, right)
        assert int(memory.isnan().sum()) == around


# ------------------------------------------------------------------------------------------------ the depth in parts


@pytest.mark.parametrize(
    ("scores_dtype", "shape", "device", "expected"),
    [
        slow(FP32, (33, 1040, 1096), {}, {(64, 4)}),  # 35 and 33 steps of 32 in parts of 9: the last is shorter
        (FP16, (64, 264, 552), {}, {(64, 2), (64, 1)}),  # d_x, of 9 steps, is in one part
        (FP32, (17, 136, 1096), {"multiprocessors": 3}, {(64, 3), (64, 1)}),  # with packed masks in one: less to read
        slow(FP16, (17, 136, 1096), {"multiprocessors": 3}, {(64, 3), (64, 1)}),
        (FP16, (18, 16, 4352), {}, {(64, 16), (64, 1)}),  # 136 steps in parts of 9: the last has one
        slow(FP32, (65, 136, 1096), {"multiprocessors": 6}, {(128, 3), (128, 1)}),
        slow(FP16, (65, 1096, 136), {"multiprocessors": 6}, {(128, 1), (128, 3)}),  # d_x
        (FP32, (130, 136, 1096), {}, {(64, 4), (64, 1)}),  # more tiles of 64 tokens occupy more multiprocessors
        (FP16, (33, 1040, 1096), {"l2_bytes": 2 * 3 * 33 * 1152 * 4 - 1}, {(64, 2)}),  # half of L2 lacks one byte for 3
        (FP32, (17, 136, 1097), {}, {(128, 1)}),  # rows that are not whole chunks
    ],
)
def test_the_depth_is_summed_in_parts_where_tiles_are_few(shape, device, expected, scores_dtype, ways):
    t = integer_inputs(*shape, FP16, scores_dtype)
    check_products(t, row_thresholds(t), "magnitude", **{"multiprocessors": 132} | device)
    assert {*ways} == expected


@pytest.mark.parametrize("at_end", [False, True])
def test_parts_write_nothing_around_their_workspace(at_end, ways):
    with emulated.outputs_at_guard_pages(at_end=at_end):
        t = integer_inputs(65, 136, 1096, BF16, BF16)
        for multiprocessors in (132, 6):  # tiles of 64 and of 128 tokens
            check_products(t, row_thresholds(t), "value", multiprocessors=multiprocessors)
        assert {tokens for tokens, parts in ways if parts > 1} == {64, 128}
        ways.clear()
        t = integer_inputs(520, 136, 72, BF16, BF16)
        check_score_grad(t, row_thresholds(t), "value", multiprocessors=132)
    assert parts_of(ways) == {2, 1}


@pytest.mark.parametrize("transposed", [False, True])
def test_parts_are_added_in_one_order_and_rounded_once(transposed, ways):
    t = random_inputs(20, 1040, 1096, BF16, BF16)
    assert_one_product_in_every_schedule(t, transposed=transposed, multiprocessors=132)
    assert parts_of(ways) == {4}


@pytest.mark.usefixtures("without_a_workspace")
def test_without_a_workspace_the_depth_is_in_one():
    t = integer_inputs(9, 40, 1096, FP16, FP16)
    check_products(t, row_thresholds(t), "magnitude", multiprocessors=132)
    t = integer_inputs(1096, 40, 72, FP16, FP16)
    check_score_grad(t, row_thresholds(t), "magnitude", multiprocessors=132)


@pytest.mark.parametrize(
    ("scores_dtype", "shape", "multiprocessors", "expected"),
    [
        (FP32, (1096, 40, 72), 132, {4, 1}),  # 35 steps of 32 tokens in parts of 9, the last of 7 and a bit; d_x in one
        slow(FP16, (520, 136, 72), 132, {2, 1}),  # 17 steps: 9 and 8
        (FP16, (1096, 40, 72), 2, {2, 1}),  # as many as the multiprocessors gain from
        (FP32, (511, 40, 72), 132, {1}),  # a part would have fewer than 256 tokens
        slow(FP16, (1096, 45, 72), 132, {1}),  # rows that are not whole chunks
    ],
)
def test_score_gradients_of_many_tokens_are_summed_in_parts(shape, multiprocessors, expected, scores_dtype, ways):
    t = integer_inputs(*shape, FP16, scores_dtype)
    check_score_grad(t, row_thresholds(t), "magnitude", multiprocessors=multiprocessors)
    assert parts_of(ways) == expected


def test_parts_of_score_gradients_are_added_in_one_order(ways):
    """Random floats added to a buffer."""
    t, before = random_inputs(1096, 136, 72, BF16, BF16), torch.randn(136, 72)

    def added(by, to, widen=lambda v: v, **device):
        by.accumulate_score_grad(to, *map(widen, (t.grad_output, t.x, t.weight)), t.scores, None, "magnitude", **device)
        return to

    own, exact = added(oracle, before.clone()), added(oracle, before.double(), Tensor.double)
    assert_one_sum_in_every_schedule(lambda: added(emulated, before.clone(), multiprocessors=132), own, exact)
    assert parts_of(ways) == {4}


# --------------------------------------------------------------------------------------------------------- schedules


@pytest.mark.parametrize(("scores_dtype", "seed", "asynchrony"), in_turn([FP32, BF16], range(3), emulated.ASYNCHRONIES))
def test_results_do_not_depend_on_the_schedule(scores_dtype, seed, asynchrony):
    """Warps run in any order, copies land at once or as late as possible; the ring of stages is used several times."""
    emulated.set_settings(seed, asynchrony, emulated.SCHEDULES[seed % 2])
    t = integer_inputs(40, 328, 360, FP16, scores_dtype, seed=seed)
    threshold = row_thresholds(t)
    check_products(t, threshold, "magnitude")
    t = integer_inputs(360, 40, 48, FP16, scores_dtype, seed=seed)
    o = Operands.of(t, row_thresholds(t))
    check_gradients(OnDevice(), "masked_linear_backward", *o.backward(BOTH))
    check_sums(o, OnDevice())


def test_tiles_give_the_right_fragments_without_bank_conflicts():
    run("test_tile_sm80.cpp", [built("machine.cpp")])
