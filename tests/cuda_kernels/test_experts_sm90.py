"""Products over experts on wgmma, in the emulator: rows of a tile, edges of experts, schedules, choice of kernel.

tests/ops/test_expert_products.py tests the results, which are the same for every backend.
"""

import emulated
import pytest
import torch
from emulated import grouped
from experts import Experts, assert_product_equals_reference, integer_experts
from guarded import guarded

from mft_kernels import reference

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
LAYOUTS = pytest.mark.parametrize("transposed", [False, True], ids=["(E, N, K)", "(E, K, N)"])
MODES = pytest.mark.parametrize("mode", [None, "magnitude", "value"])  # None: by packed mask
ROWS = (0, 5, 0, 130, 33, 0)  # none, a part of a tile, more than one; 3 more rows belong to no expert


class Hopper:
    """The op with its kernel for Hopper only, in tiles of ``tokens``."""

    def __init__(self, tokens, **device):
        self.device = {"arch": "sm_90", "tokens": tokens} | device

    def grouped_product(self, *arguments):
        return grouped.grouped_product(*arguments, **self.device)


def arguments_of(t: Experts, mode, bias=None):
    mask = (None, None, t.words()) if mode is None else (t.scores, t.threshold, None)
    return t.x, t.weight, *mask, t.offsets, bias, mode or "value", t.transposed


def check(t: Experts, mode, tokens, bias=None, **device):
    assert_product_equals_reference(Hopper(tokens, **device), *arguments_of(t, mode, bias))


def experts(n, k, dtype=BF16, **options):
    return integer_experts(n, k, dtype, dtype, **options)


@LAYOUTS
@MODES
@pytest.mark.parametrize(
    ("dtype", "tokens", "seed", "asynchrony"),
    [(BF16, 128, 0, "at_issue"), (FP16, 128, 1, "as_late_as_possible"), (BF16, 256, 2, "random")],
)
def test_results_are_exact_however_the_background_work_is_timed(dtype, tokens, seed, asynchrony, mode, transposed):
    emulated.set_settings(seed, asynchrony, emulated.SCHEDULES[seed % 2])
    t = experts(128, 128, dtype, rows=ROWS, transposed=transposed)
    check(t, mode, tokens, t.bias, multiprocessors=4)


@LAYOUTS
@pytest.mark.parametrize("multiprocessors", [2, 6])
def test_every_tile_is_made_once_by_any_number_of_clusters(multiprocessors, transposed):
    """The features have several tiles, of which the last is cut."""
    t = experts(520, 128, rows=(0, 140, 1, 0, 20), transposed=transposed)
    check(t, "magnitude", 128, t.bias, multiprocessors=multiprocessors)


@pytest.mark.parametrize(("n", "k"), [(8, 128), (136, 72), (72, 200)])
@LAYOUTS
def test_edges_of_an_expert_are_zeros_and_not_the_next_expert(n, k, transposed):
    """The elements beyond the edge are NaN, and 0 times NaN would not be 0."""
    t = experts(n, k, rows=(3, 2, 4), transposed=transposed)
    expected = grouped.grouped_product(*arguments_of(t, "value"))
    weight = torch.full_like(t.weight, torch.nan)
    for e, rows in enumerate(t.groups()):
        weight[e] = t.weight[e]
        t.weight, kept = weight, t.weight
        got = Hopper(128).grouped_product(*arguments_of(t, "value"))
        assert torch.equal(got[rows], expected[rows])
        t.weight = kept
        weight[e] = torch.nan


@LAYOUTS
def test_tokens_of_one_expert_do_not_reach_another(transposed):
    """A tile with room for them multiplies them, but does not store them."""
    t = experts(72, 128, rows=(5, 40, 70), transposed=transposed)
    expected = grouped.grouped_product(*arguments_of(t, "magnitude", t.bias))
    for rows in t.groups():
        x = torch.full_like(t.x, torch.nan)
        x[rows] = t.x[rows]
        t.x, kept = x, t.x
        got = Hopper(128).grouped_product(*arguments_of(t, "magnitude", t.bias))
        assert torch.equal(got[rows], expected[rows])
        t.x = kept


@LAYOUTS
def test_what_is_dropped_contributes_nothing(transposed):
    t = experts(128, 128, rows=(40, 3), transposed=transposed)
    expected = Hopper(128).grouped_product(*arguments_of(t, None))
    kept = reference.unpack_mask(t.words(), list(t.weight.shape))
    for bad in (torch.nan, torch.inf):
        t.weight = t.weight.masked_fill(~kept, bad)
        assert torch.equal(Hopper(128).grouped_product(*arguments_of(t, None)), expected)


def test_more_experts_than_a_warp_looks_at_a_time():
    rows = [0] * 300
    for expert, some in ((0, 2), (3, 1), (126, 3), (127, 1), (128, 2), (255, 1), (299, 1)):
        rows[expert] = some
    t = experts(8, 8, rows=tuple(rows))
    check(t, "magnitude", 128, t.bias)


@pytest.mark.parametrize("at_end", [True, False])
@pytest.mark.parametrize(
    "offsets",
    [(0, 1, 8, 8, 41, 57, 57), (30, 4, 90, 12, -5, 60, 3), (-7, -7, 2**31 - 1, 0, -(2**31), 61, 60), (0,) * 7],
    ids=["rising", "falling", "beyond", "none"],
)
def test_whatever_offsets_hold_nothing_outside_is_touched(offsets, at_end):
    for transposed in (False, True):
        t = experts(40, 128, transposed=transposed)
        t.offsets = torch.tensor(offsets, dtype=torch.int32)
        packed = guarded(t.words(), at_end=at_end)
        for name in ("x", "weight", "scores", "threshold", "offsets", "bias"):
            setattr(t, name, guarded(getattr(t, name), at_end=at_end))
        with emulated.outputs_at_guard_pages(at_end=at_end):
            for mask in [(t.scores, t.threshold, None)] + [(None, None, packed)] * (packed.shape[-1] % 4 == 0):
                arguments = t.x, t.weight, *mask, t.offsets, t.bias, "magnitude", transposed
                assert_product_equals_reference(Hopper(128), *arguments)


@LAYOUTS
def test_an_expert_s_bits_are_those_of_the_dense_kernel_in_every_schedule(transposed):
    """With random floats, an expert's sums are of its own rows only, in one part."""
    t = experts(136, 128, rows=(5, 1, 70, 33), nobodys=0, transposed=transposed)
    generator = torch.Generator().manual_seed(0)
    for name in ("x", "weight", "scores"):
        value = getattr(t, name)
        setattr(t, name, torch.randn(value.shape, generator=generator).to(value.dtype))
    found = []
    for seed, asynchrony in enumerate(emulated.ASYNCHRONIES):
        emulated.set_settings(seed, asynchrony, emulated.SCHEDULES[seed % 2])
        found.append(Hopper((128, 256)[seed % 2]).grouped_product(*arguments_of(t, "magnitude")))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    for e, rows in enumerate(t.groups()):
        own = t.weight[e], t.scores[e], t.threshold[e]
        if transposed:
            wanted = (t.x[rows], *own, "magnitude", [True, False, False, False])
            alone = emulated.masked_linear_backward(t.x[rows], *wanted, arch="sm_90", l2_bytes=0)[0]
        else:
            alone = emulated.masked_linear(t.x[rows], *own, None, "magnitude", arch="sm_90", l2_bytes=0)
        assert torch.equal(found[0][rows], alone)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"k": 68}, "rows must begin at multiples of 16 bytes"),
        ({"n": 12}, "the output's rows must begin at multiples of 16 bytes"),
        ({"words": True, "k": 64}, "the packed mask's rows must begin at multiples of 16 bytes"),
        ({"apart": True}, "weights and scores of experts must begin at multiples of 16 bytes"),
    ],
)
def test_what_tma_cannot_read_is_refused_by_name(change, reason):
    given = {"n": 16, "k": 128, "words": False, "apart": False} | change
    t = experts(given["n"], given["k"])
    if given["apart"]:
        memory = torch.zeros(t.weight.numel() + 4 * len(t.weight), dtype=BF16)
        stride = t.weight[0].numel() + 4
        t.weight = memory.as_strided(t.weight.shape, (stride, given["k"], 1)).copy_(t.weight)
    with pytest.raises(RuntimeError, match=reason):
        check(t, None if given["words"] else "magnitude", 128)


@pytest.mark.parametrize("mode", [None, "magnitude"])
@pytest.mark.parametrize(("rows", "is_hopper_s"), [((250, 261), True), ((20, 40), False)])
def test_the_op_gives_one_result_by_whatever_kernel_it_chooses(rows, is_hopper_s, mode):
    """Hopper's kernel from 128 rows per expert on average, if its plan takes no more cycles."""
    t = experts(256, 128, rows=rows, nobodys=0)
    out = torch.empty(len(t.x), 256, dtype=BF16)
    mask = (None, None, t.words()) if mode is None else (t.scores, t.threshold, None)
    asked = grouped.product(t.x, t.weight, *mask, t.offsets, None, mode or "value", False, out)
    device = {"arch": "hopper", "multiprocessors": 4}
    of_hopper, general = (emulated.plan(f"grouped_product_{of}", asked, device) for of in ("sm90", "sm80"))
    assert is_hopper_s == (of_hopper.cycles <= general.cycles and len(t.x) >= 128 * len(rows))
    got = grouped.grouped_product(*arguments_of(t, mode), **device)
    assert torch.equal(got, grouped.grouped_product(*arguments_of(t, mode), multiprocessors=4))
