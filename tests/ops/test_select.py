"""Every backend's kept_threshold equals the reference's, bit for bit, and kept_thresholds that of each expert."""

import pytest
import torch
from by_name import oracle
from forms import every_backend_but_cuda
from products import MODES

from mft_kernels import reference

WORDS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
DTYPES = tuple(WORDS)


def assert_same_threshold(kernels, scores, keep_ratio, mode):
    """Assert the reference's result: equal in dtype, shape and value (NaN equals NaN)."""
    got = kernels.kept_threshold(scores, keep_ratio, mode)
    expected = oracle.kept_threshold(scores.cpu(), keep_ratio, mode)
    assert got.device == scores.device
    assert got.dtype == expected.dtype
    assert got.shape == ()
    assert torch.equal(got.cpu(), expected) or (got.isnan() and expected.isnan()), (got, expected, keep_ratio)


def normal(*shape, seed=0):
    return 0.02 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def ratio(kept, numel):
    """Return a keep ratio that keeps exactly ``kept``, whatever the rounding of a quotient."""
    return max(kept - 0.5, 0) / numel


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_is_the_kth_largest_of_random_scores(kernels, dtype, mode):
    scores = normal(37, 999).to(kernels.device, dtype)
    for keep_ratio in kernels.fewer((0, 1e-4, 0.3, 0.5, 0.9, 1), 2):
        assert_same_threshold(kernels, scores, keep_ratio, mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_rank_is_found_among_few_scores(kernels, dtype, mode):
    scores = torch.tensor([3.0, -3.0, 0.5, 0.0, -0.0, 0.0, -1e-7, 6e-8, -65504.0, 65504.0, 0.5])
    for kept in range(scores.numel() + 1):
        assert_same_threshold(kernels, scores.to(kernels.device, dtype), ratio(kept, scores.numel()), mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_largest_and_the_smallest_may_lie_at_the_ends_of_the_memory(kernels, dtype, mode):
    for numel in (1, 7, 4095, 4096, 4097, 12293):  # around one block of Triton's, and several blocks
        scores = torch.linspace(-0.5, 0.5, numel).to(dtype)
        scores[0], scores[-1] = -3, 5
        for kept in (1, numel):
            assert_same_threshold(kernels, scores.to(kernels.device), ratio(kept, numel), mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_scores_are_their_own_threshold(kernels, dtype, mode):
    numel = 4099
    for value in (0.25, -0.25, -0.0):
        scores = torch.full((numel,), value, dtype=dtype, device=kernels.device)
        for kept in (1, numel):
            assert_same_threshold(kernels, scores, ratio(kept, numel), mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_neighbouring_numbers_are_told_apart(kernels, dtype, mode):
    one = torch.tensor(1.0, dtype=dtype).view(WORDS[dtype])
    scores = (one + torch.arange(70)).to(WORDS[dtype]).view(dtype)
    scores = torch.stack([scores, -scores], 1).flatten().to(kernels.device)
    for kept in kernels.fewer((1, 2, 69, 70, 71, 139, 140), 3):
        assert_same_threshold(kernels, scores, ratio(kept, 140), mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ties_at_the_threshold_are_all_kept(kernels, dtype, mode):
    scores = torch.tensor([[0.5, -0.5, 0.25, 0.5, 0.5, 0.0, -1.0, 0.25]]).to(kernels.device, dtype)
    threshold = kernels.kept_threshold(scores, 0.25, mode)  # k = 2 falls among the scores of 0.5
    assert threshold == 0.5
    expected = 0b01011011 if mode == "magnitude" else 0b00011001
    assert kernels.pack_mask(scores, threshold, mode).tolist() == [[expected]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_negative_and_positive_zero_tie(kernels, dtype):
    scores = torch.tensor([-1.0, -0.0, 0.0, -0.0, 0.0, 1.0]).to(kernels.device, dtype)
    for kept in (2, 3, 4, 5):
        threshold = kernels.kept_threshold(scores, ratio(kept, 6), "value")
        assert threshold == 0
        assert kernels.pack_mask(scores[None], threshold, "value").tolist() == [[0b111110]]
        # The bits are the same in whichever order the zeros lie.
        turned = kernels.kept_threshold(scores.flip(0), ratio(kept, 6), "value")
        assert turned.signbit() == threshold.signbit()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_subnormal_scores_are_ordered(kernels, dtype, mode):
    tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps  # the smallest number above zero
    scores = torch.tensor([1.0, -2.0, 3.0, 0.0, -4.0, 2.0], dtype=torch.float64).mul(tiny).to(dtype)
    assert scores.count_nonzero() == 5
    for kept in range(1, 7):
        assert_same_threshold(kernels, scores.to(kernels.device), ratio(kept, 6), mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_non_finite_score_makes_the_threshold_nan(kernels, dtype, mode):
    scores = normal(7, 9).to(dtype)
    scores[3, 5] = torch.finfo(dtype).max
    scores[0, 0] = torch.finfo(dtype).min
    scores = scores.to(kernels.device)
    for keep_ratio in (0, 0.02, 1):
        assert_same_threshold(kernels, scores, keep_ratio, mode)
    for bad in kernels.fewer((torch.nan, -torch.inf, torch.inf, -torch.nan), 2):
        scores[6, 8] = bad
        for keep_ratio in (0, 0.02, 0.5, 1):
            assert kernels.kept_threshold(scores, keep_ratio, mode).isnan(), (bad, keep_ratio)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_payload_of_a_nan_is_seen(kernels, dtype, mode):
    word = WORDS[dtype]
    infinities = torch.tensor([torch.inf, -torch.inf], dtype=dtype).view(word)
    every_bit = torch.tensor([torch.iinfo(word).max, -1], dtype=word)
    for payload in torch.cat([infinities + 1, every_bit]).view(dtype):  # next to the infinities, and all bits set
        scores = normal(100).to(dtype)
        scores[57] = payload
        assert scores[57].isnan()
        assert kernels.kept_threshold(scores.to(kernels.device), 0.5, mode).isnan()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_scores_keep_nothing(kernels, dtype):
    for shape in ((0,), (0, 5), (5, 0)):
        for mode in MODES:
            assert_same_threshold(kernels, torch.empty(shape, dtype=dtype, device=kernels.device), 0.9, mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_and_misaligned_scores_are_read(kernels, dtype, mode):
    scores = normal(65, 130, seed=2).to(kernels.device, dtype)
    shifted = torch.empty(scores.numel() + 1, dtype=dtype, device=kernels.device)[1:].view_as(scores).copy_(scores)
    for view in (scores.T, scores[:, ::2], scores[1:, 3:], scores[:1].expand(40, 130), shifted):
        assert_same_threshold(kernels, view, 0.7, mode)


def test_any_bits_give_the_threshold_of_the_reference(kernels):
    hypothesis = pytest.importorskip("hypothesis")
    st = hypothesis.strategies

    @hypothesis.given(data=st.data(), mode=st.sampled_from(MODES), dtype=st.sampled_from(DTYPES))
    @hypothesis.settings(max_examples=80, deadline=None)
    def check(data, mode, dtype):
        word = WORDS[dtype]
        top = 2 ** (8 * word.itemsize - 1)
        # Small integers as well as any bits: subnormals, zeros of both signs (-top is -0.0), and ties.
        bits = st.one_of(st.integers(-top, top - 1), st.integers(-top, -top + 2), st.integers(0, 2))
        scores = torch.tensor(data.draw(st.lists(bits, min_size=1, max_size=40)), dtype=word).view(dtype)
        if data.draw(st.booleans()):
            scores = scores.nan_to_num(0, 1, -1)
        kept = data.draw(st.integers(0, scores.numel()))
        assert_same_threshold(kernels, scores.to(kernels.device), ratio(kept, scores.numel()), mode)

    check()


@every_backend_but_cuda
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_expert_has_its_own_kth_largest(kernels, dtype, mode):
    """More scores than one program of Triton's takes, at addresses that no wide load can read, with one NaN."""
    scores = torch.randn(5, 3, 1369, generator=torch.Generator().manual_seed(0)).to(dtype)
    scores[1, 2, 5], scores[3], scores[4] = torch.nan, 0.25, scores[4].abs() + 1
    for keep_ratio in kernels.fewer((0.3, 0, 0.9, 1), 2):
        found = kernels.kept_thresholds(scores.to(kernels.device), keep_ratio, mode).cpu()
        expected = torch.stack([reference.kept_threshold(one, keep_ratio, mode) for one in scores])
        assert found.dtype == expected.dtype
        assert found.isnan().tolist() == expected.isnan().tolist() == [False, True, False, False, False]
        assert torch.equal(found.nan_to_num(), expected.nan_to_num())
