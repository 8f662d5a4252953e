"""pack_mask and pack_signs of every backend equal the reference's, bit for bit."""

import pytest
import torch
from by_name import oracle
from products import DTYPES, MODES, assert_same

from mft_kernels import reference
from mft_kernels.testing import integer_inputs

# One word and part of one; several words; a row of a block of words, less and more; no rows and no columns.
SHAPES = (
    *((1, 1), (1, 31), (3, 32), (2, 33), (15, 64), (16, 255), (17, 256), (5, 257), (33, 520), (70, 1)),
    *((0, 5), (5, 0)),
)


def assert_matches_reference(kernels, scores, threshold, mode):
    """Assert that mask and signs equal the reference's."""
    packed = kernels.pack_mask(scores, threshold, mode)
    assert_same(packed, oracle.pack_mask(scores.cpu(), threshold.cpu(), mode))
    for got, expected in zip(kernels.pack_signs(scores), oracle.pack_signs(scores.cpu()), strict=True):
        assert_same(got, expected)


def integer_scores(kernels, rows, columns, dtype):
    return integer_inputs(1, rows, columns, scores_dtype=dtype).scores.to(kernels.device)


def number(kernels, value, dtype):
    return torch.tensor(value, dtype=torch.float64).to(kernels.device, dtype)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_shape_equals_the_reference(kernels, dtype, mode):
    for shape in SHAPES:
        scores = integer_scores(kernels, *shape, dtype)
        for threshold in (2.0, 0.0):  # zeros of the padding are not below the second
            assert_matches_reference(kernels, scores, number(kernels, threshold, dtype), mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_scores_and_thresholds_equal_the_reference(kernels, dtype, mode):
    info = torch.finfo(dtype)
    tiny = info.smallest_normal * info.eps  # the smallest number above zero
    if kernels.interpreted and dtype == torch.bfloat16:
        tiny = info.smallest_normal  # the interpreter changes smaller numbers when it casts them to fp32
    special = [torch.nan, -torch.nan, torch.inf, -torch.inf, 0.0, -0.0, tiny, -tiny, 3 * tiny, info.max, info.min, 1.0]
    scores = number(kernels, [special, special[::-1]], dtype)
    for threshold in (torch.nan, torch.inf, -torch.inf, 0.0, -0.0, tiny, 2 * tiny, -tiny, info.max, info.min):
        t = number(kernels, threshold, dtype)
        assert_same(kernels.pack_mask(scores, t, mode), oracle.pack_mask(scores.cpu(), t.cpu(), mode))
    signs, zeros = kernels.pack_signs(scores)
    assert zeros == 4
    assert_same(signs, oracle.pack_signs(scores.cpu())[0])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_row_has_its_own_threshold(kernels, dtype, mode):
    scores = integer_scores(kernels, 37, 300, dtype)
    thresholds = (torch.arange(37) % 6 - 2).to(kernels.device, dtype)
    assert_matches_reference(kernels, scores, thresholds, mode)
    assert_matches_reference(kernels, scores, torch.stack([thresholds, -thresholds], 1)[:, 0], mode)
    assert_matches_reference(kernels, scores, thresholds[:1].expand(37), mode)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_and_misaligned_scores_are_read(kernels, dtype):
    scores = integer_scores(kernels, 40, 322, dtype)
    shifted = torch.empty(scores.numel() + 1, dtype=dtype, device=kernels.device)[1:].view_as(scores).copy_(scores)
    views = [scores[1:, 3:], scores[:, :33], scores[::2], scores[:1].expand(40, 322), shifted]
    if kernels.any_strides:  # its backend copies others: cuda_kernels/test_bindings.py
        views += [scores.T, scores[:, ::2], scores[:, :1].expand(40, 9)]
    for view in views:
        assert_matches_reference(kernels, view, number(kernels, 2, dtype), "magnitude")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_zero_is_counted(kernels, dtype):
    scores = torch.zeros(50, 600, dtype=dtype, device=kernels.device)
    scores[:, 1::2] = -0.0
    signs, zeros = kernels.pack_signs(scores)
    assert zeros.dtype == torch.int64
    assert zeros == 30000
    assert signs.count_nonzero() == 0
    scores[49, 599] = 1
    assert kernels.pack_signs(scores)[1] == 29999


def test_bits_unpack_to_the_mask(kernels):
    scores = torch.randn(9, 100, generator=torch.Generator().manual_seed(0)).to(kernels.device)
    packed = kernels.pack_mask(scores, number(kernels, 0.5, torch.float32), "magnitude")
    assert torch.equal(reference.unpack_mask(packed, [9, 100]), scores.abs() >= 0.5)
