"""The products of few tokens in the emulator: results bit for bit, and how they are cut for cards that are not here."""

import itertools

import emulated
import pytest
import torch
from guarded import guarded
from test_plans import HOPPERS, NVIDIAS, SHAPES, device_of, planned
from test_products_sm80 import row_thresholds, same, within

from mft_kernels import reference
from mft_kernels.testing import assert_within_budget, integer_inputs, random_inputs

BF16, FP16 = torch.bfloat16, torch.float16


@pytest.fixture
def cuts(monkeypatch):
    """Of every product that was launched: (slices, parts, slabs) of decode_sm80, or None for another kernel."""
    seen, plan = [], emulated.plan

    def noted(kernel, asked, device):
        found = plan(kernel, asked, device)
        slices, parts, part_units, slab_units = emulated.decode_cut(asked, device)
        decodes = kernel == "product_decode" or emulated.decodes(asked, device)
        seen.append((slices, parts, -(-part_units // slab_units)) if decodes else None)
        return found

    monkeypatch.setattr(emulated, "plan", noted)
    return seen


def check(t, mode="magnitude", **device):
    """By scores and by words, with a bias and without."""
    threshold = row_thresholds(t)
    packed = reference.pack_mask(t.scores, threshold, mode)
    for bias in (t.bias, None):
        expected = reference.masked_linear(t.x, t.weight, t.scores, threshold, bias, mode)
        same(emulated.masked_linear_packed(t.x, t.weight, packed, bias, **device), expected)
        same(emulated.masked_linear(t.x, t.weight, t.scores, threshold, bias, mode, **device), expected)


@pytest.mark.parametrize("mode", ["magnitude", "value"])
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("tokens", range(1, 17))
def test_every_number_of_tokens(tokens, dtype, mode, cuts):
    check(integer_inputs(tokens, 40, 200, dtype, dtype), mode)
    assert None not in cuts


@pytest.mark.parametrize(("dtype", "mode"), [(BF16, "magnitude"), (FP16, "value")])
@pytest.mark.parametrize("tokens", [17, 24, 25, 32, 33, 48, 49, 56, 63, 64])
def test_up_to_64_tokens(tokens, dtype, mode):
    """In pairs of tiles, of which the last may have 1 to 16 tokens."""
    check(integer_inputs(tokens, 40, 200, dtype, dtype), mode, arch="decode")
    check(integer_inputs(tokens, 133, 296, dtype, dtype), mode, arch="decode", multiprocessors=17)


@pytest.mark.parametrize("multiprocessors", [1, 4, 132])
@pytest.mark.parametrize("shape", [(3, 1, 8), (5, 130, 264), (9, 17, 32), (16, 129, 1096), (1, 8, 4104), (2, 300, 40)])
def test_every_tail(shape, multiprocessors, cuts):
    """Of features and of columns, in one part and in many, the last of which is shorter."""
    check(integer_inputs(*shape, BF16, BF16), multiprocessors=multiprocessors)
    assert None not in cuts


def test_a_depth_is_cut_among_warps_blocks_and_slabs(cuts):
    """All of it, in small shapes: 1 to 8 slices, parts, and more of x than shared memory holds."""
    for shape, device in (
        ((16, 24, 4104), {"multiprocessors": 1}),
        ((16, 264, 4104), {"multiprocessors": 2}),
        ((16, 520, 2056), {"multiprocessors": 4}),
        ((4, 264, 2056), {"multiprocessors": 132}),
        ((1, 60, 520), {"multiprocessors": 4}),
        ((7, 1032, 264), {"multiprocessors": 17}),
        ((12, 136, 1160), {"multiprocessors": 3, "shared_bytes": 40 * 1024}),
        ((64, 136, 1160), {"multiprocessors": 3, "shared_bytes": 100 * 1024, "arch": "decode"}),
        ((40, 24, 4104), {"multiprocessors": 4, "arch": "decode"}),
    ):
        check(integer_inputs(*shape, FP16, FP16), **device)
    assert {slices for slices, _, _ in cuts} == {1, 2, 4, 8}
    assert max(parts for _, parts, _ in cuts) > 8
    assert max(slabs for _, _, slabs in cuts) > 1
    assert {parts == 1 for _, parts, slabs in cuts if slabs > 1} == {True, False}


def test_without_a_workspace_the_depth_is_in_one(monkeypatch):
    monkeypatch.setattr(emulated, "plan", lambda kernel, asked, device: emulated.Plan())
    check(integer_inputs(9, 40, 1096, FP16, FP16), multiprocessors=132)


def test_other_kernels_take_what_has_many_tokens_odd_rows_or_other_scores(cuts):
    for shape, scores in (((65, 24, 40), BF16), ((3, 24, 41), BF16), ((3, 24, 40), torch.float32)):
        t = integer_inputs(*shape, BF16, scores)
        threshold = torch.tensor(1.0, dtype=scores)
        expected = reference.masked_linear(t.x, t.weight, t.scores, threshold, t.bias, "magnitude")
        same(emulated.masked_linear(t.x, t.weight, t.scores, threshold, t.bias, "magnitude"), expected)
    assert {*cuts} == {None}


@pytest.mark.parametrize("at_end", [True, False])
@pytest.mark.parametrize("shape", [(1, 1, 8), (13, 37, 40), (5, 24, 520), (35, 133, 72)])
def test_nothing_outside_the_matrices_is_touched(shape, at_end):
    t = integer_inputs(*shape, BF16, BF16)
    for name in ("x", "weight", "scores", "bias"):
        setattr(t, name, guarded(getattr(t, name), at_end=at_end))
    threshold = guarded(row_thresholds(t), at_end=at_end)
    packed = guarded(reference.pack_mask(t.scores, threshold, "magnitude"), at_end=at_end)
    for multiprocessors in (1, 132):
        with emulated.outputs_at_guard_pages(at_end=at_end):
            device = {"arch": "decode", "multiprocessors": multiprocessors}
            emulated.masked_linear(t.x, t.weight, t.scores, threshold, t.bias, "magnitude", **device)
            emulated.masked_linear_packed(t.x, t.weight, packed, t.bias, **device)


def test_strided_rows_are_read_where_they_lie(cuts):
    t = integer_inputs(11, 40, 72, BF16, BF16)
    for name in ("x", "weight", "scores"):
        setattr(t, name, within(getattr(t, name), 8, 72 + 16))
    check(t)
    assert None not in cuts


@pytest.mark.parametrize("tokens", [11, 27])
def test_what_is_not_finite_stays_with_its_token_and_its_weight(tokens):
    t = integer_inputs(tokens, 24, 40, BF16, BF16)
    t.x[3, 7], t.x[10] = torch.nan, torch.inf
    t.scores[:, 7] = 5  # kept
    t.scores[:, 9], t.weight[:, 9] = 0, torch.nan  # dropped
    t.scores[5, 11], t.weight[5, 11] = 5, -torch.inf
    threshold = torch.tensor(2.0, dtype=BF16)
    packed = reference.pack_mask(t.scores, threshold, "magnitude")
    packed[:, 1] |= ~0xFF  # bits behind the last column mean nothing
    expected = reference.masked_linear(t.x, t.weight, t.scores, threshold, t.bias, "magnitude")
    assert expected[[0, 1, 2, 4]][:, [0, 1, 2, 3, 4, 6]].isfinite().all()
    decode = {"arch": "decode"}
    same(emulated.masked_linear(t.x, t.weight, t.scores, threshold, t.bias, "magnitude", **decode), expected)
    same(emulated.masked_linear_packed(t.x, t.weight, packed, t.bias, **decode), expected)


@pytest.mark.parametrize("shape", [(12, 136, 2056), (5, 264, 1096), (50, 136, 2056)])
def test_sums_are_added_in_one_order_whatever_ends_first(shape, cuts):
    """Random floats, bit for bit in every schedule; within the budget."""
    t = random_inputs(*shape, BF16, BF16)
    threshold = reference.kept_threshold(t.scores, 0.9, "magnitude")
    arguments = (t.x, t.weight, t.scores, threshold, t.bias, "magnitude")
    packed = reference.pack_mask(t.scores, threshold, "magnitude")
    device, results = {"arch": "decode", "multiprocessors": 132}, []
    for seed, asynchrony in enumerate(emulated.ASYNCHRONIES):
        emulated.set_settings(seed, asynchrony, emulated.SCHEDULES[seed % 2])
        results.append(emulated.masked_linear(*arguments, **device))
        words = emulated.masked_linear_packed(t.x, t.weight, packed, t.bias, **device)
        assert_within_budget(words, reference.masked_linear(*arguments), _exact(t, threshold))
    assert all(parts > 1 for _, parts, _ in cuts)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    assert_within_budget(results[0], reference.masked_linear(*arguments), _exact(t, threshold))


def _exact(t, threshold):
    return reference.masked_linear(t.x.double(), t.weight.double(), t.scores, threshold, t.bias.double(), "magnitude")


# ------------------------------------------------------------------------------------------------- cards not here

FEATURES, DEPTHS = (1024, 4096, 14336), (576, 4096, 14336)


def traffic(card, tokens, n, k):
    """(blocks, bytes from L2 and memory for those of weight and mask: x again and again, parts to and fro)."""
    of = {name: emulated.Matrix(None, 1, tokens, c, c) for name, c in (("out", n), ("in", k))}
    asked = emulated.Product(out=of["out"], weight=emulated.Matrix(None, 1, n, k, k))
    setattr(asked, "in", of["in"])
    asked.keep.words = 128
    slices, parts, _, _ = emulated.decode_cut(asked, device_of(card))
    tiles = -(-n * slices // 128)
    least = n * k * (2 + 1 / 8)
    again = tiles * tokens * k * 2 + (2 * parts * tokens * n * 4 if parts > 1 else 0) + tokens * n * 2
    return tiles * parts, (least + again) / least


def test_every_multiprocessor_has_a_block_and_little_more_is_read_than_the_weight():
    """A tenth more at most for one token. For 16 it is the tokens themselves, from L2, that 8 blocks and more read."""
    for card in NVIDIAS:
        for n, k in itertools.product(FEATURES, DEPTHS):
            of = {tokens: traffic(card, tokens, n, k) for tokens in (1, 4, 8, 16)}
            assert min(blocks for blocks, _ in of.values()) >= card.multiprocessors, (card.name, n, k)
            assert of[1][1] <= 1.1, (card.name, n, k)
            assert min(n, k) < 4096 or of[16][1] <= 1.3, (card.name, n, k)


def test_from_17_to_64_tokens_the_model_finds_the_cheaper_of_two_kernels():
    """Of small weights that is decode_sm80. Of large ones it is for a third, an eighth faster at most."""
    small, large, between = [], [], []
    for card, shape, mask, tokens in itertools.product(NVIDIAS, SHAPES, ("bf16", "words"), (17, 32, 33, 64)):
        taken, few, general = (planned(f"product_{kernel}", card, tokens, shape, mask) for kernel in _KERNELS)
        decodes = few.cycles <= general.cycles
        assert taken.cycles == (few if decodes else general).cycles
        assert taken.workspace == (few if decodes else general).workspace
        if shape[0] * shape[1] < 1024**2:
            small.append(decodes)
        else:
            large.append(decodes)
            between.append(few.cycles / general.cycles)
    assert sum(small) >= 0.95 * len(small)
    assert 0.2 * len(large) < sum(large) < 0.5 * len(large)
    assert min(between) > 7 / 8


_KERNELS = ("sm80", "decode", "general")


@pytest.mark.parametrize("card", HOPPERS, ids=lambda card: card.name)
def test_on_hopper_the_model_finds_little_between_this_and_its_own_product(card):
    """One token takes as long at most (within 2 %); 16 up to an eighth more, and then Hopper's own is taken."""
    for shape, mask, tokens in itertools.product(SHAPES, ("bf16", "words"), (1, 8, 16)):
        own = planned("product_sm90", card, tokens, shape, mask)
        few = planned("product_sm80", card, tokens, shape, mask)
        assert few.tokens == (8 if tokens <= 8 else 16)
        assert own.tokens == 0 or few.cycles < (1.02 if tokens == 1 else 9 / 8) * own.cycles, (shape, mask, tokens)
