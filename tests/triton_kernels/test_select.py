"""kept_threshold of the triton backend is that of the reference, bit for bit."""

from dataclasses import replace

import pytest
import torch

from mft_kernels import reference
from mft_kernels.backends.triton import select
from mft_kernels.backends.triton.target import H100, H100_OLD_TRITON, MI300X, interpreting

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MODES = ("magnitude", "value")
BLOCK = select._BLOCK


def assert_same_threshold(scores, keep_ratio, mode):
    """As the reference finds it: equal in dtype, shape and value (NaN equals NaN)."""
    got = select.kept_threshold(scores, keep_ratio, mode)
    expected = reference.kept_threshold(scores.cpu(), keep_ratio, mode)
    assert got.device == scores.device
    assert got.dtype == expected.dtype
    assert got.shape == ()
    assert torch.equal(got.cpu(), expected) or (got.isnan() and expected.isnan()), (got, expected)


def normal(*shape, seed=0):
    return 0.02 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def ratio(kept, numel):
    """A keep ratio that keeps just so many, whatever the rounding of a quotient."""
    return max(kept - 0.5, 0) / numel


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("keep_ratio", [0, 1e-4, 0.9])
def test_it_is_the_kth_largest_of_random_scores(device, dtype, mode, keep_ratio):
    assert_same_threshold(normal(37, 999).to(device, dtype), keep_ratio, mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_rank_is_found_among_few_scores(device, dtype, mode):
    scores = torch.tensor([3.0, -3.0, 0.5, 0.0, -0.0, 0.0, -1e-7, 6e-8, -65504.0, 65504.0, 0.5]).to(device, dtype)
    for kept in range(scores.numel() + 1):
        assert_same_threshold(scores, ratio(kept, scores.numel()), mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("numel", [1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 5])
def test_blocks_meet_without_a_seam(device, dtype, mode, numel):
    scores = (torch.arange(numel) - numel // 2).to(dtype)  # the largest and the smallest at the ends of the memory
    for kept in {1, (numel + 1) // 2, numel}:
        assert_same_threshold(scores.to(device), ratio(kept, numel), mode)


@pytest.mark.parametrize("digits", [select._WIDE, select._NARROW])
@pytest.mark.parametrize("multiprocessors", [1, 5])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_digits_and_the_number_of_programs_change_no_bit(device, dtype, mode, multiprocessors, digits):
    scores = normal(6 * BLOCK + 77, seed=1).to(device, dtype)
    kept = reference.kept_count(scores.numel(), 0.9)
    got = select._kth_largest(
        scores, kept, mode, digits=digits[scores.element_size(), mode], multiprocessors=multiprocessors
    )
    assert torch.equal(got.cpu(), reference.kept_threshold(scores.cpu(), 0.9, mode))


@pytest.mark.parametrize("table", [select._WIDE, select._NARROW])
def test_digits_add_up_to_the_key_and_the_first_holds_sign_and_exponent(table):
    for dtype, exponent in ((torch.float32, 8), (torch.bfloat16, 8), (torch.float16, 5)):
        for mode in MODES:
            digits = table[dtype.itemsize, mode]
            sign = 1 if mode == "value" else 0
            assert sum(digits) == 8 * dtype.itemsize - 1 + sign
            assert digits[0] >= sign + exponent


def test_triton_3_6_and_hip_count_fewer_bins_at_once():
    assert select._digits(H100) is select._WIDE
    assert select._digits(replace(H100, compiler=(3, 10))) is select._WIDE
    assert select._digits(H100_OLD_TRITON) is select._NARROW
    assert select._digits(MI300X) is select._NARROW


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("value", [0.25, -0.25, -0.0])
def test_equal_scores_are_their_own_threshold(device, dtype, mode, value):
    scores = torch.full((BLOCK + 3,), value, dtype=dtype, device=device)
    for kept in (1, BLOCK + 3):
        assert_same_threshold(scores, ratio(kept, BLOCK + 3), mode)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
def test_ties_at_the_threshold_are_all_kept(device, dtype, mode):
    scores = torch.tensor([0.5, -0.5, 0.25, 0.5, 0.5, 0.0, -1.0, 0.25]).to(device, dtype)
    threshold = select.kept_threshold(scores, 0.25, mode)  # k = 2 falls among the 0.5
    assert threshold == 0.5
    expected = [1, 1, 0, 1, 1, 0, 1, 0] if mode == "magnitude" else [1, 0, 0, 1, 1, 0, 0, 0]
    assert reference.keep_mask(scores, threshold, mode).int().tolist() == expected


@pytest.mark.parametrize("dtype", DTYPES)
def test_negative_and_positive_zero_tie(device, dtype):
    scores = torch.tensor([-1.0, -0.0, 0.0, -0.0, 0.0, 1.0]).to(device, dtype)
    for kept in (2, 3, 4, 5):
        threshold = select.kept_threshold(scores, ratio(kept, 6), "value")
        assert threshold == 0
        assert reference.keep_mask(scores, threshold, "value").tolist() == [False, True, True, True, True, True]
        # The same bits whichever way the zeros lie.
        turned = select.kept_threshold(scores.flip(0), ratio(kept, 6), "value")
        assert turned.signbit() == threshold.signbit()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
def test_subnormal_scores_are_ordered(device, dtype, mode):
    tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps  # the smallest above zero
    scores = torch.tensor([1.0, -2.0, 3.0, 0.0, -4.0, 2.0], dtype=torch.float64).mul(tiny).to(dtype)
    assert scores.count_nonzero() == 5
    for kept in range(1, 7):
        assert_same_threshold(scores.to(device), ratio(kept, 6), mode)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [torch.nan, -torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("mode", MODES)
def test_one_non_finite_score_makes_the_threshold_nan(device, dtype, bad, mode):
    scores = normal(7, 9).to(dtype)
    scores[3, 5] = torch.finfo(dtype).max
    scores[0, 0] = torch.finfo(dtype).min
    scores = scores.to(device)
    for keep_ratio in (0, 0.02, 1):
        assert_same_threshold(scores, keep_ratio, mode)
    scores[6, 8] = bad
    for keep_ratio in (0, 0.02, 0.5, 1):
        assert select.kept_threshold(scores, keep_ratio, mode).isnan()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [1, -1])
def test_every_payload_of_a_nan_is_seen(device, dtype, bits):
    word = torch.int16 if dtype.itemsize == 2 else torch.int32
    infinity = torch.tensor([torch.inf, -torch.inf], dtype=dtype).view(word)
    scores = normal(100).to(dtype)
    # The NaN next to an infinity, and the one with all bits set.
    scores[57] = torch.where(torch.tensor(bits > 0), infinity[0] + 1, -1).to(word).view(dtype)
    assert scores[57].isnan()
    for mode in MODES:
        assert select.kept_threshold(scores.to(device), 0.5, mode).isnan()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0,), (0, 5), (5, 0)])
def test_no_scores_keep_nothing(device, dtype, shape):
    for mode in MODES:
        assert_same_threshold(torch.empty(shape, dtype=dtype, device=device), 0.9, mode)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
def test_strided_and_misaligned_scores_are_read(device, dtype, mode):
    scores = normal(65, 130, seed=2).to(device, dtype)
    shifted = torch.empty(scores.numel() + 1, dtype=dtype, device=device)[1:].view_as(scores).copy_(scores)
    for view in (scores.T, scores[:, ::2], scores[1:, 3:], scores[:1].expand(40, 130), shifted):
        assert_same_threshold(view, 0.7, mode)


def test_scores_that_require_grad_are_taken(device):
    scores = normal(5, 7).to(device).requires_grad_()
    assert not select.kept_threshold(scores, 0.5, "magnitude").requires_grad


@pytest.mark.skipif(interpreting(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("mode", MODES)
def test_it_runs_in_a_cuda_graph_and_never_waits_for_the_device(device, mode):
    scores = normal(300, 1000).to(device)
    select.kept_threshold(scores, 0.9, mode)  # compiles
    graph = torch.cuda.CUDAGraph()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.graph(graph):
            threshold = select.kept_threshold(scores, 0.9, mode)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for seed in (1, 2):
        scores.copy_(normal(300, 1000, seed=seed))
        graph.replay()
        assert torch.equal(threshold.cpu(), reference.kept_threshold(scores.cpu(), 0.9, mode))


@pytest.mark.skipif(interpreting(), reason="2^31 scores are too many for the interpreter")
@pytest.mark.parametrize("mode", MODES)
def test_more_than_2_to_the_31_scores_are_counted(device, mode):
    numel = 2**31 + 4097
    scores = torch.zeros(numel, dtype=torch.bfloat16, device=device)
    scores[-3:] = torch.tensor([1.0, 2.0, 3.0])
    scores[:2] = torch.tensor([4.0, 2.5])
    arguments = {"digits": select._WIDE[2, mode], "multiprocessors": 100}
    for kept, expected in ((1, 4.0), (2, 3.0), (3, 2.5), (4, 2.0), (5, 1.0), (6, 0.0), (numel, 0.0)):
        assert select._kth_largest(scores, kept, mode, **arguments) == expected
