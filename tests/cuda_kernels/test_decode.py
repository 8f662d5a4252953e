"""Products of few tokens in the emulator: results bit for bit, and how they are cut for cards not in this machine."""

import itertools
from dataclasses import replace
from typing import NamedTuple

import emulated
import pytest
import torch
from by_name import oracle
from checked_products import OnDevice, assert_one_product_in_every_schedule
from in_turn import in_turn
from products import MODES, Operands, row_thresholds
from products import assert_same as same
from test_plans import device_of

from mft_kernels import reference
from mft_kernels.backends.triton.cards import A100, H100
from mft_kernels.testing import assert_within_budget, integer_inputs, random_inputs

BF16, FP16 = torch.bfloat16, torch.float16


class Cut(NamedTuple):
    slices: int
    parts: int
    slabs: int
    cluster: int
    rows: int


@pytest.fixture
def cuts(monkeypatch):
    """Return a list of a Cut of decode_sm80, or None for another kernel, for every product that is launched."""
    seen, plan = [], emulated.plan

    def noted(kernel, asked, device):
        found = plan(kernel, asked, device)
        slices, parts, part_units, slab_units, cluster, features = emulated.decode_cut(asked, device)
        decodes = kernel == "product_decode" or emulated.decodes(asked, device)
        assert not decodes or (found.workspace > 0) == (parts > cluster)
        seen.append(Cut(slices, parts, -(-part_units // slab_units), cluster, slices * features) if decodes else None)
        return found

    monkeypatch.setattr(emulated, "plan", noted)
    return seen


def check(t, mode="magnitude", **device):
    """Check with scores and with packed masks, with a bias and without."""
    o, by = Operands.of(t, row_thresholds(t), mode), OnDevice(**device)
    for bias in (t.bias, None):
        for op, arguments in (
            ("masked_linear_packed", (t.x, t.weight, o.packed, bias)),
            ("masked_linear", replace(o, bias=bias).forward),
        ):
            same(getattr(by, op)(*arguments), getattr(oracle, op)(*arguments))


@pytest.mark.parametrize(("dtype", "mode", "tokens"), in_turn([BF16, FP16], MODES, range(1, 17)))
def test_every_number_of_tokens(tokens, dtype, mode, cuts):
    check(integer_inputs(tokens, 40, 200, dtype, dtype), mode)
    assert None not in cuts


@pytest.mark.parametrize(("dtype", "tokens", "mode"), in_turn([BF16, FP16], [17, 24, 32, 33, 49, 64], MODES))
def test_up_to_64_tokens(tokens, dtype, mode):
    """Pairs of tiles, of which the last may have 1 to 16 tokens."""
    check(integer_inputs(tokens, 40, 200, dtype, dtype), mode, arch="decode")
    check(integer_inputs(tokens, 133, 296, dtype, dtype), mode, arch="decode", multiprocessors=17)


@pytest.mark.parametrize(
    ("multiprocessors", "shape"),
    [
        *((count, (16, 129, 1096)) for count in (1, 4, 132)),
        *((1, (3, 1, 8)), (4, (5, 130, 264)), (132, (9, 17, 32)), (132, (1, 8, 4104)), (4, (2, 300, 40))),
    ],
)
def test_every_tail(shape, multiprocessors, cuts):
    """Tails of features and of columns, in one part and in many parts, of which the last is shorter."""
    check(integer_inputs(*shape, BF16, BF16), multiprocessors=multiprocessors)
    assert None not in cuts


def test_a_depth_is_cut_among_warps_blocks_and_slabs(cuts):
    """All cuts, in small shapes: 1 to 8 slices of 8 and 16 warps, parts, and more of x than shared memory holds."""
    for shape, device in (
        ((16, 24, 4104), {"multiprocessors": 1}),
        ((16, 264, 4104), {"multiprocessors": 2}),
        ((16, 520, 2056), {"multiprocessors": 4}),
        ((4, 264, 2056), {"multiprocessors": 132}),
        ((1, 60, 520), {"multiprocessors": 4}),
        ((7, 1032, 264), {"multiprocessors": 17}),
        ((12, 136, 1160), {"multiprocessors": 3, "shared_bytes": 40 * 1024}),
        ((64, 136, 1160), {"multiprocessors": 3, "shared_bytes": 100 * 1024, "arch": "decode"}),
        ((64, 136, 4104), {"multiprocessors": 4, "shared_bytes": 100 * 1024, "arch": "decode"}),
        ((64, 136, 1096), {"multiprocessors": 17, "arch": "decode"}),
    ):
        check(integer_inputs(*shape, FP16, FP16), **device)
    assert {cut.slices for cut in cuts} == {1, 2, 4, 8}
    assert max(cut.parts for cut in cuts) > 8
    assert max(cut.slabs for cut in cuts) > 1
    assert {cut.parts == 1 for cut in cuts if cut.slabs > 1} == {True, False}
    assert {cut.rows for cut in cuts} == {128, 256}
    assert {cut.cluster for cut in cuts} == {1}


def test_on_hopper_a_cluster_s_blocks_take_the_parts(cuts):
    """Clusters of 2, 4 and 8, in slabs too; the last block has less to sum than the others."""
    for shape, device in (
        ((3, 130, 520), {"multiprocessors": 17}),
        ((9, 264, 2056), {"multiprocessors": 132}),
        ((16, 520, 2056), {"multiprocessors": 16}),
        ((33, 300, 520), {"multiprocessors": 4}),
        ((40, 33, 264), {"multiprocessors": 17}),
        ((64, 264, 4104), {"multiprocessors": 8, "shared_bytes": 60 * 1024}),
    ):
        check(integer_inputs(*shape, FP16, FP16), arch="decode", capability=90, **device)
    assert {cut.cluster for cut in cuts} == {2, 4, 8}
    assert all(cut.parts == cut.cluster for cut in cuts)
    assert {cut.rows for cut in cuts} == {128, 256}
    assert {cut.slabs > 1 for cut in cuts} == {True, False}


@pytest.mark.usefixtures("without_a_workspace")
def test_without_a_workspace_the_depth_is_in_one():
    check(integer_inputs(9, 40, 1096, FP16, FP16), multiprocessors=132)


def test_among_many_tokens_too_what_is_not_finite_stays_with_its_token_and_its_weight():
    """Pairs of tiles; tests/ops has fewer tokens."""
    t = integer_inputs(27, 24, 40, BF16, BF16)
    t.x[3, 7], t.x[10] = torch.nan, torch.inf
    t.scores[:, 7] = 5  # kept
    t.scores[:, 9], t.weight[:, 9] = 0, torch.nan  # dropped
    t.scores[5, 11], t.weight[5, 11] = 5, -torch.inf
    threshold = torch.tensor(2.0, dtype=BF16)
    packed = reference.pack_mask(t.scores, threshold, "magnitude")
    packed[:, 1] |= ~0xFF  # bits behind the last column have no meaning
    expected = oracle.masked_linear(t.x, t.weight, t.scores, threshold, t.bias, "magnitude")
    assert expected[[0, 1, 2, 4]][:, [0, 1, 2, 3, 4, 6]].isfinite().all()
    decode = {"arch": "decode"}
    same(emulated.masked_linear(t.x, t.weight, t.scores, threshold, t.bias, "magnitude", **decode), expected)
    same(emulated.masked_linear_packed(t.x, t.weight, packed, t.bias, **decode), expected)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("shape", [(12, 136, 2056), (5, 264, 1096), (50, 136, 2056)])
def test_sums_are_added_in_one_order_whatever_ends_first(shape, capability, cuts):
    """Random floats, by scores and by words."""
    t = random_inputs(*shape, BF16, BF16)
    device = {"arch": "decode", "multiprocessors": 132, "capability": capability}
    assert_one_product_in_every_schedule(t, transposed=False, **device)
    threshold = reference.kept_threshold(t.scores, 0.9, "magnitude")
    packed = reference.pack_mask(t.scores, threshold, "magnitude")
    words = emulated.masked_linear_packed(t.x, t.weight, packed, t.bias, **device)
    arguments = (t.scores, threshold, t.bias, "magnitude")
    exact = oracle.masked_linear(t.x.double(), t.weight.double(), t.scores, threshold, t.bias.double(), "magnitude")
    assert_within_budget(words, oracle.masked_linear(t.x, t.weight, *arguments), exact)
    assert all(cut.parts > 1 for cut in cuts)
    assert {cut.cluster > 1 for cut in cuts} == {capability == 90}


def test_every_part_has_something_to_sum_and_clusters_are_whole():
    """For cards that are not in this machine too."""
    for card, tokens, n, k in itertools.product((A100, H100), (1, 16, 64), (16, 130, 1024), range(8, 1500, 24)):
        of = {name: emulated.Matrix(None, 1, tokens, c, c) for name, c in (("out", n), ("in", k))}
        asked = emulated.Product(**of, weight=emulated.Matrix(None, 1, n, k, k), keep=emulated.Keep(words=128))
        _, parts, part_units, _, cluster, _ = emulated.decode_cut(asked, device_of(card))
        assert (parts - 1) * part_units < -(-k // 32) <= parts * part_units
        assert cluster in (1, parts)
