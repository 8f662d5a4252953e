"""kept_threshold of the CUDA kernels, in the emulator, is that of the reference, bit for bit."""

import emulated
import pytest
import torch
from guarded import guarded
from in_turn import in_turn

from mft_kernels import reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WORDS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
MODES = ("magnitude", "value")
VECTORS = 4096  # of 16 bytes, that a block takes at once
#: One with room for 32,768 counts in a block's shared memory, and one without.
CAPABILITIES = (80, 86)


def assert_same_threshold(scores, keep_ratio, mode, capabilities=CAPABILITIES, **device):
    """As the reference finds it: equal in dtype, shape and value (NaN equals NaN)."""
    expected = reference.kept_threshold(scores, keep_ratio, mode)
    for capability in capabilities:
        got = emulated.kept_threshold(scores, keep_ratio, mode, capability=capability, **device)
        assert got.dtype == expected.dtype
        assert got.shape == ()
        assert torch.equal(got, expected) or (got.isnan() and expected.isnan()), (got, expected, capability)


def normal(*shape, seed=0):
    return 0.02 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def ratio(kept, numel):
    """A keep ratio that keeps just so many, whatever the rounding of a quotient."""
    return max(kept - 0.5, 0) / numel


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("keep_ratio", [0, 1e-4, 0.5, 0.9, 1])
def test_it_is_the_kth_largest_of_random_scores(dtype, mode, keep_ratio):
    assert_same_threshold(normal(13, 333).to(dtype), keep_ratio, mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_rank_is_found_among_few_scores(dtype, mode):
    scores = torch.tensor([3.0, -3.0, 0.5, 0.0, -0.0, 0.0, -1e-7, 6e-8, -65504.0, 65504.0, 0.5]).to(dtype)
    for kept in range(scores.numel() + 1):
        assert_same_threshold(scores, ratio(kept, scores.numel()), mode)


@pytest.mark.parametrize(
    ("mode", "dtype", "vectors", "more"), in_turn(MODES, DTYPES, [1, VECTORS, 3 * VECTORS], [-1, 0, 1, 7])
)
def test_blocks_meet_without_a_seam(mode, dtype, vectors, more):
    numel = vectors * 16 // dtype.itemsize + more
    # Of these the smallest and the largest are at the ends of the memory, and no other score is like them.
    scores = torch.linspace(-0.5, 0.5, numel).to(dtype)
    scores[0], scores[-1] = -3, 5
    for kept in {1, 2, numel - 1, numel}:
        assert_same_threshold(scores, ratio(kept, numel), mode, CAPABILITIES[:1] if kept > 1 else CAPABILITIES)


@pytest.mark.parametrize(("mode", "dtype", "multiprocessors"), in_turn(MODES, DTYPES, range(1, 9)))
def test_the_number_of_blocks_changes_no_bit(mode, dtype, multiprocessors):
    scores = normal(7 * VECTORS * 16 // dtype.itemsize + 77, seed=1).to(dtype)
    emulated.set_settings(seed=multiprocessors)
    assert_same_threshold(scores, 0.9, mode, (90,), multiprocessors=multiprocessors)


@pytest.mark.parametrize("capability", [75, 80, 86, 87, 89, 90, 100, 103, 110, 120, 121])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_capability_finds_it(dtype, capability):
    for mode in MODES:
        assert_same_threshold(normal(3001).to(dtype), 0.75, mode, (capability,))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_order_of_the_warps_changes_nothing(dtype, seed):
    emulated.set_settings(seed=seed)
    scores = normal(5000, seed=seed).to(dtype)
    for mode in MODES:
        assert_same_threshold(scores, 0.3 + 0.1 * seed, mode, multiprocessors=3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("value", [0.25, -0.25, -0.0])
def test_equal_scores_are_their_own_threshold(dtype, mode, value):
    numel = 3 * 65536 + 3  # more than 16 bits count
    scores = torch.full((numel,), value, dtype=dtype)
    for kept in (1, numel):
        assert_same_threshold(scores, ratio(kept, numel), mode, multiprocessors=1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
def test_neighbouring_numbers_are_told_apart(dtype, mode):
    one = torch.tensor(1.0, dtype=dtype).view(WORDS[dtype])
    scores = torch.cat(
        [(one + i).to(WORDS[dtype]).view(dtype).reshape(1) * sign for i in range(70) for sign in (1, -1)]
    )
    for kept in (1, 2, 69, 70, 71, 139, 140):
        assert_same_threshold(scores, ratio(kept, 140), mode)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
def test_ties_at_the_threshold_are_all_kept(dtype, mode):
    scores = torch.tensor([0.5, -0.5, 0.25, 0.5, 0.5, 0.0, -1.0, 0.25]).to(dtype)
    threshold = emulated.kept_threshold(scores, 0.25, mode)  # k = 2 falls among the 0.5
    assert threshold == 0.5
    expected = [1, 1, 0, 1, 1, 0, 1, 0] if mode == "magnitude" else [1, 0, 0, 1, 1, 0, 0, 0]
    assert reference.keep_mask(scores, threshold, mode).int().tolist() == expected


@pytest.mark.parametrize("dtype", DTYPES)
def test_negative_and_positive_zero_tie(dtype):
    scores = torch.tensor([-1.0, -0.0, 0.0, -0.0, 0.0, 1.0]).to(dtype)
    for kept in (2, 3, 4, 5):
        threshold = emulated.kept_threshold(scores, ratio(kept, 6), "value")
        assert threshold == 0
        assert reference.keep_mask(scores, threshold, "value").tolist() == [False, True, True, True, True, True]
        # The same bits whichever way the zeros lie.
        turned = emulated.kept_threshold(scores.flip(0), ratio(kept, 6), "value")
        assert turned.signbit() == threshold.signbit()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
def test_subnormal_scores_are_ordered(dtype, mode):
    tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps  # the smallest above zero
    scores = torch.tensor([1.0, -2.0, 3.0, 0.0, -4.0, 2.0], dtype=torch.float64).mul(tiny).to(dtype)
    assert scores.count_nonzero() == 5
    for kept in range(1, 7):
        assert_same_threshold(scores, ratio(kept, 6), mode)


@pytest.mark.parametrize(
    ("mode", "dtype", "bad"), in_turn(MODES, DTYPES, [torch.nan, -torch.nan, torch.inf, -torch.inf])
)
def test_one_non_finite_score_makes_the_threshold_nan(mode, dtype, bad):
    scores = normal(7, 9).to(dtype)
    scores[3, 5] = torch.finfo(dtype).max
    scores[0, 0] = torch.finfo(dtype).min
    for keep_ratio in (0, 0.02, 1):
        assert_same_threshold(scores, keep_ratio, mode)
    scores[6, 8] = bad
    for keep_ratio in (0, 0.02, 0.5, 1):
        assert emulated.kept_threshold(scores, keep_ratio, mode).isnan()
        assert emulated.kept_threshold(scores, keep_ratio, mode, capability=86).isnan()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("negative", [False, True])
def test_every_payload_of_a_nan_is_seen(dtype, negative):
    infinity = torch.tensor(-torch.inf if negative else torch.inf, dtype=dtype).view(WORDS[dtype])
    every = torch.tensor(-1 if negative else torch.iinfo(WORDS[dtype]).max, dtype=WORDS[dtype])
    for payload in (infinity + 1, every):  # next to the infinity, and all bits
        scores = normal(100).to(dtype)
        scores[57] = payload.view(dtype)
        assert scores[57].isnan()
        for mode in MODES:
            for capability in CAPABILITIES:
                assert emulated.kept_threshold(scores, 0.5, mode, capability=capability).isnan()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0,), (0, 5), (5, 0)])
def test_no_scores_keep_nothing(dtype, shape):
    for mode in MODES:
        assert_same_threshold(torch.empty(shape, dtype=dtype), 0.9, mode)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("at_end", [True, False])
@pytest.mark.parametrize("numel", [1, 2, 7, 8, 9, 31, 64, 1005])
def test_nothing_outside_the_scores_is_read(dtype, numel, at_end):
    for mode in MODES:
        scores = guarded(normal(numel).to(dtype), at_end=at_end)
        with emulated.outputs_at_guard_pages(at_end=at_end):
            assert_same_threshold(scores, 0.7, mode)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
def test_misaligned_scores_are_read(dtype, mode):
    memory = normal(3000, seed=2).to(dtype)
    memory[:9], memory[2990:] = 100, 100  # would be seen
    for begin in range(9, 18):
        for numel in (1, 5, 1234):
            scores = memory[begin : begin + numel]
            assert_same_threshold(scores, 0.6, mode, CAPABILITIES[:1])
            assert_same_threshold(scores, ratio(1, numel), mode, CAPABILITIES[1:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
def test_it_packs_the_mask_that_the_threshold_implies(dtype, mode):
    for scores in (normal(33, 70).to(dtype), normal(5, 64, seed=1).to(dtype)):
        threshold, words = emulated.kept_threshold(scores, 0.9, mode, words=True)
        assert torch.equal(words, reference.pack_mask(scores, threshold, mode))
        scores[1, 1] = torch.nan  # then nothing is kept
        threshold, words = emulated.kept_threshold(scores, 0.9, mode, words=True)
        assert threshold.isnan()
        assert words.count_nonzero() == 0


def test_what_cannot_be_counted_is_refused():
    asked = emulated.Select(type=1, count=2**32, k=1)
    with pytest.raises(RuntimeError, match=r"fewer than 2\^32, got 4294967296; use the triton backend"):
        emulated._call("kept_threshold", asked, {})
    asked = emulated.Select(type=1, count=5, k=6)
    with pytest.raises(RuntimeError, match="k must lie between 0 and the 5 scores, got 6"):
        emulated._call("kept_threshold", asked, {})


def test_any_bits_give_the_threshold_of_the_reference():
    hypothesis = pytest.importorskip("hypothesis")
    st = hypothesis.strategies

    @hypothesis.given(data=st.data(), mode=st.sampled_from(MODES), dtype=st.sampled_from(DTYPES))
    @hypothesis.settings(max_examples=100, deadline=None)
    def check(data, mode, dtype):
        word = WORDS[dtype]
        top = 2 ** (8 * word.itemsize - 1)
        # Small integers next to any bits: subnormals, zeros of both signs (-top is -0.0), and ties.
        bits = st.one_of(st.integers(-top, top - 1), st.integers(-top, -top + 2), st.integers(0, 2))
        scores = torch.tensor(data.draw(st.lists(bits, min_size=1, max_size=40)), dtype=word).view(dtype)
        if data.draw(st.booleans()):
            scores = scores.nan_to_num(0, 1, -1)
        keep_ratio = ratio(data.draw(st.integers(0, scores.numel())), scores.numel())
        assert_same_threshold(scores, keep_ratio, mode, (data.draw(st.sampled_from(CAPABILITIES)),))

    check()
