"""Tests specific to the register-fed wgmma kernels, in the emulator: rings, clusters, TMA, sums in parts, schedules.

tests/ops checks that their results are the reference's, whatever the values.
"""

import itertools
from functools import partial

import emulated
import pytest
import torch
from by_name import oracle
from guarded import guarded

from mft_kernels import reference
from mft_kernels.testing import assert_within_budget, random_inputs

D_X = [True, False, False, False]
slow = partial(pytest.param, marks=pytest.mark.slow)  # takes seconds in the emulator


def integers(*shape: int, dtype: torch.dtype, low: int = -2, high: int = 3) -> torch.Tensor:
    """Return small integers, so that every sum is exact in fp32 and fp16, and in bf16 if K is small."""
    return torch.randint(low, high, shape).to(dtype)


def problem(
    m: int, n: int, k: int, dtype: torch.dtype = torch.float16, *, mode: str = "magnitude", by_row: bool = False
):
    torch.manual_seed(m + 3 * n + 7 * k)
    scores = (torch.randn(n, k) * 0.02).to(dtype)
    threshold = reference.kept_threshold(scores, 0.9, "magnitude")
    if mode == "value":
        threshold = -threshold
    if by_row:
        threshold = (threshold * (1 + torch.arange(n) % 5)).to(dtype)
    return integers(m, k, dtype=dtype), integers(m, n, dtype=dtype), integers(n, k, dtype=dtype), scores, threshold


def check_forward(x, weight, scores, threshold, bias, mode, **device):
    expected = oracle.masked_linear(x, weight, scores, threshold, bias, mode)
    device = {"arch": "sm_90"} | device
    assert torch.equal(emulated.masked_linear(x, weight, scores, threshold, bias, mode, **device), expected)
    packed = reference.pack_mask(scores, threshold, mode)
    if packed.shape[1] % 4 == 0:
        assert torch.equal(emulated.masked_linear_packed(x, weight, packed, bias, **device), expected)


def check_d_x(grad, x, weight, scores, threshold, mode, **device):
    expected = oracle.masked_linear_backward(grad, x, weight, scores, threshold, mode, D_X)[0]
    device = {"arch": "sm_90"} | device
    if threshold.dim() == 0:
        actual = emulated.masked_linear_backward(grad, x, weight, scores, threshold, mode, D_X, **device)[0]
        assert torch.equal(actual, expected)
    packed = reference.pack_mask(scores, threshold, mode)
    if packed.shape[1] % 4 == 0:
        actual = emulated.masked_linear_packed_backward(grad, x, weight, packed, None, None, mode, D_X, **device)[0]
        assert torch.equal(actual, expected)


def check(m: int, n: int, k: int, dtype: torch.dtype = torch.float16, mode: str = "magnitude", **device):
    x, grad, weight, scores, threshold = problem(m, n, k, dtype, mode=mode)
    check_forward(x, weight, scores, threshold, integers(n, dtype=dtype), mode, **device)
    check_d_x(grad, x, weight, scores, threshold, mode, **device)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", ["magnitude", "value"])
@pytest.mark.parametrize(
    ("seed", "asynchrony"), [(0, "at_issue"), (1, "as_late_as_possible"), (2, "random"), (3, "random")]
)
def test_results_are_exact_however_the_background_work_is_timed(dtype, mode, seed, asynchrony):
    emulated.set_settings(seed, asynchrony)
    check(40, 256, 256, dtype, mode)


@pytest.mark.parametrize(("tokens", "multiprocessors"), [(70, 2), (70, 6), (130, 4), slow(300, 2), slow(300, 6)])
def test_every_tile_is_made_once_by_any_number_of_clusters(tokens, multiprocessors):
    """The ring continues from tile to tile: there are more steps than stages."""
    check(tokens, 520, 640, multiprocessors=multiprocessors)


@pytest.mark.parametrize(("m", "n", "k"), [(1, 8, 8), (5, 128, 128), (64, 136, 72), (65, 264, 200), (33, 8, 1000)])
def test_edges_are_cut_and_filled_with_zeros(m, n, k):
    check(m, n, k)


def test_nothing_outside_of_the_inputs_is_read():
    """TMA knows the sizes; threads read thresholds and bias, some of them beyond the last row."""
    x, _, weight, scores, threshold = (guarded(t, at_end=True) for t in problem(40, 200, 128, by_row=True))
    check_forward(x, weight, scores, threshold, guarded(integers(200, dtype=x.dtype), at_end=True), "magnitude")


def test_d_x_with_thresholds_by_row_asks_for_bits():
    x, grad, weight, scores, threshold = problem(40, 128, 128, by_row=True)
    with pytest.raises(RuntimeError, match="thresholds by row must be packed"):
        emulated.masked_linear_backward(grad, x, weight, scores, threshold, "magnitude", D_X, arch="sm_90")


@pytest.mark.parametrize("what", ["weight", "x", "scores"])
def test_what_tma_cannot_read_is_refused_by_name(what):
    x, _, weight, scores, threshold = problem(8, 64, 64)
    tensors = {"x": x, "weight": weight, "scores": scores}
    wide = torch.zeros(tensors[what].shape[0], 65, dtype=x.dtype)
    tensors[what] = wide[:, :64]
    with pytest.raises(RuntimeError, match="must begin at multiples of 16 bytes, got a stride of 130"):
        emulated.masked_linear(*tensors.values(), threshold, None, "magnitude", arch="sm_90")


def test_words_that_tma_cannot_read_are_refused():
    x, _, weight, scores, threshold = problem(8, 64, 96)
    packed = reference.pack_mask(scores, threshold, "magnitude")
    with pytest.raises(RuntimeError, match="the packed mask's rows must begin at multiples of 16 bytes"):
        emulated.masked_linear_packed(x, weight, packed, None, arch="sm_90")


# --------------------------------------------------------------------------------------------------------- in parts


@pytest.fixture
def parts(monkeypatch):
    """Return a list of (tokens of a tile, parts) for each product."""
    seen, plan = [], emulated.plan

    def noted(*asked):
        found = plan(*asked)
        seen.append((found.tokens, found.parts))
        return found

    monkeypatch.setattr(emulated, "plan", noted)
    return seen


@pytest.mark.parametrize(
    ("shape", "multiprocessors", "expected"),
    [
        slow((33, 264, 1096), 132, {(64, 3), (64, 1)}),  # 9 pairs of steps; d_x has 3, in one part
        ((64, 1032, 1256), 132, {(64, 4), (64, 3)}),  # 10 pairs in parts of 3, the last has one; d_x has 9
        slow((1, 264, 4352), 6, {(64, 3), (64, 1)}),  # more tiles than clusters: rings continue from part to part
        ((70, 264, 1256), 16, {(128, 4), (128, 1)}),
        ((130, 264, 1256), 16, {(256, 4), (256, 1), (128, 2)}),
    ],
)
def test_sums_in_parts_are_exact(shape, multiprocessors, expected, parts):
    check(*shape, multiprocessors=multiprocessors)
    assert {*parts} == expected


@pytest.mark.parametrize("at_end", [False, True])
def test_parts_write_nothing_around_their_workspace(at_end, parts):
    x, _, weight, scores, threshold = problem(33, 264, 1096)
    with emulated.outputs_at_guard_pages(at_end=at_end):
        check_forward(x, weight, scores, threshold, None, "magnitude", multiprocessors=132)
    assert {*parts} == {(64, 3)}


@pytest.mark.parametrize("transposed", [False, True])
def test_parts_are_added_in_one_order_and_rounded_once(transposed, parts):
    """Random floats give the same bits, whichever cluster ends first, within the error budget."""
    t = random_inputs(20, 1032, 1096, torch.bfloat16, torch.bfloat16)
    threshold = reference.kept_threshold(t.scores, 0.9, "magnitude")
    op, arguments = "masked_linear", (t.x, t.weight, t.scores, threshold, t.bias, "magnitude")
    if transposed:
        op, arguments = "masked_linear_backward", (t.grad_output, *arguments[:4], "magnitude", D_X)
    results = []
    for seed, asynchrony in enumerate(emulated.ASYNCHRONIES):
        emulated.set_settings(seed, asynchrony, emulated.SCHEDULES[seed % 2])
        results.append(getattr(emulated, op)(*arguments, arch="sm_90", multiprocessors=132))
    double = [v.double() if isinstance(v, torch.Tensor) else v for v in arguments]
    own, exact = (getattr(oracle, op)(*given) for given in (arguments, double))
    if transposed:
        own, exact, *results = (made[0] for made in (own, exact, *results))
    assert {*parts} == {(64, 3)}
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    assert_within_budget(results[0], own, exact)


def test_without_a_workspace_the_sum_is_in_one(monkeypatch):
    monkeypatch.setattr(emulated, "plan", lambda *asked: emulated.Plan())
    check(33, 264, 1096, multiprocessors=132)


@pytest.mark.slow
def test_many_schedules_give_one_result():
    x, grad, weight, scores, threshold = problem(130, 256, 384)
    for settings in itertools.product(range(3), emulated.ASYNCHRONIES, emulated.SCHEDULES):
        emulated.set_settings(*settings)
        check_forward(x, weight, scores, threshold, None, "magnitude", multiprocessors=2)
        check_d_x(grad, x, weight, scores, threshold, "magnitude", multiprocessors=2)
