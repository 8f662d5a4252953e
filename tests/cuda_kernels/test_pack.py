"""pack_mask and pack_signs of the CUDA kernels, in the emulator, are those of the reference, bit for bit."""

import emulated
import pytest
import torch
from guarded import guarded

from mft_kernels import reference
from mft_kernels.testing import integer_inputs

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MODES = ("magnitude", "value")


def assert_same(got, expected):
    """Equal in dtype, shape and every element."""
    assert got.dtype == expected.dtype
    assert got.shape == expected.shape
    assert torch.equal(got, expected), (got, expected)


def assert_matches_reference(scores, threshold, mode, **device):
    """Mask and signs, against the reference."""
    assert_same(emulated.pack_mask(scores, threshold, mode, **device), reference.pack_mask(scores, threshold, mode))
    for got, expected in zip(emulated.pack_signs(scores, **device), reference.pack_signs(scores)):
        assert_same(got, expected)


def integer_scores(rows, columns, dtype):
    return integer_inputs(1, rows, columns, scores_dtype=dtype).scores


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape",
    [(1, 1), (1, 31), (3, 32), (2, 33), (15, 64), (16, 255), (17, 256), (5, 257), (33, 520), (70, 1), (0, 5), (5, 0)],
)
def test_every_shape_equals_the_reference(dtype, mode, shape):
    scores = integer_scores(*shape, dtype)
    for threshold in (2.0, 0.0):  # zeros beyond the edge are not below the second
        assert_matches_reference(scores, torch.tensor(threshold, dtype=dtype), mode)


@pytest.mark.parametrize("columns", [1023, 1024, 1025, 1056, 2048, 3333])
@pytest.mark.parametrize("multiprocessors", [1, 3])
def test_long_rows_are_taken_in_groups_of_words(columns, multiprocessors):
    scores = integer_scores(70, columns, torch.bfloat16)
    assert_matches_reference(scores, torch.tensor(1.0).bfloat16(), "magnitude", multiprocessors=multiprocessors)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_special_scores_and_thresholds_equal_the_reference(dtype, mode):
    info = torch.finfo(dtype)
    tiny = info.smallest_normal * info.eps  # the smallest above zero
    special = [torch.nan, -torch.nan, torch.inf, -torch.inf, 0.0, -0.0, tiny, -tiny, 3 * tiny, info.max, info.min, 1.0]
    scores = torch.tensor([special, special[::-1]], dtype=torch.float64).to(dtype)
    for threshold in (torch.nan, torch.inf, -torch.inf, 0.0, -0.0, tiny, 2 * tiny, -tiny, info.max, info.min):
        t = torch.tensor(threshold, dtype=torch.float64).to(dtype)
        assert_same(emulated.pack_mask(scores, t, mode), reference.pack_mask(scores, t, mode))
    signs, zeros = emulated.pack_signs(scores)
    assert zeros == 4
    assert_same(signs, reference.pack_signs(scores)[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
def test_each_row_has_its_own_threshold(dtype, mode):
    scores = integer_scores(37, 300, dtype)
    thresholds = (torch.arange(37) % 6 - 2).to(dtype)
    assert_matches_reference(scores, thresholds, mode)
    assert_matches_reference(scores, torch.stack([thresholds, -thresholds], 1)[:, 0], mode)
    assert_matches_reference(scores, thresholds[:1].expand(37), mode)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_and_misaligned_scores_are_read_as_they_are(dtype):
    scores = integer_scores(40, 322, dtype)
    shifted = torch.empty(scores.numel() + 1, dtype=dtype)[1:].view_as(scores).copy_(scores)
    for view in (scores[1:, 3:], scores[:, :33], scores[::2], scores[:1].expand(40, 322), shifted):
        assert_matches_reference(view, torch.tensor(2, dtype=dtype), "magnitude")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("at_end", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (3, 33), (5, 257), (2, 1030)])
def test_nothing_outside_the_scores_is_touched(dtype, shape, at_end):
    scores = guarded(integer_scores(*shape, dtype), at_end=at_end)
    thresholds = guarded(torch.arange(shape[0]).to(dtype), at_end=at_end)
    with emulated.outputs_at_guard_pages(at_end=at_end):
        assert_matches_reference(scores, thresholds, "magnitude")


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_zero_is_counted(dtype):
    scores = torch.zeros(50, 600, dtype=dtype)
    scores[:, 1::2] = -0.0
    signs, zeros = emulated.pack_signs(scores)
    assert zeros.dtype == torch.int64
    assert zeros == 30000
    assert signs.count_nonzero() == 0
    scores[49, 599] = 1
    assert emulated.pack_signs(scores, multiprocessors=1)[1] == 29999


def test_the_order_of_the_warps_changes_nothing():
    scores = integer_scores(100, 1111, torch.float16)
    for seed in range(5):
        emulated.set_settings(seed=seed)
        assert_matches_reference(scores, torch.tensor(1).half(), "value", multiprocessors=seed + 1)
