"""pack_mask and pack_signs of the triton backend are those of the reference, bit for bit."""

import pytest
import torch

from mft_kernels import reference
from mft_kernels.backends.triton import bits
from mft_kernels.backends.triton.target import interpreting
from mft_kernels.testing import integer_inputs

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MODES = ("magnitude", "value")


def assert_same(got, expected):
    """Equal in dtype, shape and every element."""
    assert got.dtype == expected.dtype
    assert got.shape == expected.shape
    assert torch.equal(got.cpu(), expected.cpu()), (got, expected)


def assert_matches_reference(scores, threshold, mode):
    """Mask and signs, against the reference."""
    assert_same(bits.pack_mask(scores, threshold, mode), reference.pack_mask(scores, threshold, mode))
    for got, expected in zip(bits.pack_signs(scores), reference.pack_signs(scores)):
        assert_same(got, expected)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape",
    [(1, 1), (1, 31), (3, 32), (2, 33), (15, 64), (16, 255), (17, 256), (5, 257), (33, 520), (70, 1), (0, 5), (5, 0)],
)
def test_every_shape_equals_the_reference(device, dtype, mode, shape):
    scores = integer_inputs(1, *shape, scores_dtype=dtype).scores.to(device)
    for threshold in (2.0, 0.0):  # zeros beyond the edge are not below the second
        assert_matches_reference(scores, torch.tensor(threshold, dtype=dtype, device=device), mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_special_scores_and_thresholds_equal_the_reference(device, dtype, mode):
    info = torch.finfo(dtype)
    tiny = info.smallest_normal * info.eps  # the smallest above zero
    if interpreting() and dtype == torch.bfloat16:
        tiny = info.smallest_normal  # the interpreter turns smaller ones into others when it casts them to fp32
    special = [torch.nan, -torch.nan, torch.inf, -torch.inf, 0.0, -0.0, tiny, -tiny, 3 * tiny, info.max, info.min, 1.0]
    scores = torch.tensor([special, special[::-1]], dtype=torch.float64).to(device, dtype)
    for threshold in (torch.nan, torch.inf, -torch.inf, 0.0, -0.0, tiny, 2 * tiny, -tiny, info.max, info.min):
        t = torch.tensor(threshold, dtype=torch.float64).to(device, dtype)
        assert_same(bits.pack_mask(scores, t, mode), reference.pack_mask(scores, t, mode))
    signs, zeros = bits.pack_signs(scores)
    assert zeros == 4
    assert_same(signs, reference.pack_signs(scores)[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
def test_each_row_has_its_own_threshold(device, dtype, mode):
    scores = integer_inputs(1, 37, 300, scores_dtype=dtype).scores.to(device)
    thresholds = (torch.arange(37) % 6 - 2).to(device, dtype)
    assert_matches_reference(scores, thresholds, mode)
    assert_matches_reference(scores, torch.stack([thresholds, -thresholds], 1)[:, 0], mode)
    assert_matches_reference(scores, thresholds[:1].expand(37), mode)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_and_misaligned_scores_are_read_as_they_are(device, dtype):
    scores = integer_inputs(1, 40, 322, scores_dtype=dtype).scores.to(device)
    shifted = torch.empty(scores.numel() + 1, dtype=dtype, device=device)[1:].view_as(scores).copy_(scores)
    two = torch.tensor(2, dtype=dtype, device=device)
    for view in (
        scores.T,
        scores[:, ::2],
        scores[1:, 3:],
        scores[:1].expand(40, 322),
        scores[:, :1].expand(40, 9),
        shifted,
    ):
        assert_matches_reference(view, two, "magnitude")


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_zero_is_counted(device, dtype):
    scores = torch.zeros(50, 600, dtype=dtype, device=device)
    scores[:, 1::2] = -0.0
    signs, zeros = bits.pack_signs(scores)
    assert zeros.dtype == torch.int64
    assert zeros == 30000
    assert signs.count_nonzero() == 0
    scores[49, 599] = 1
    assert bits.pack_signs(scores)[1] == 29999


def test_bits_unpack_to_the_mask(device):
    scores = torch.randn(9, 100, generator=torch.Generator().manual_seed(0)).to(device)
    threshold = torch.tensor(0.5, device=device)
    packed = bits.pack_mask(scores, threshold, "magnitude")
    assert_same(reference.unpack_mask(packed, [9, 100]), scores.abs() >= 0.5)


@pytest.mark.skipif(interpreting(), reason="2^31 scores are too many for the interpreter")
def test_more_than_2_to_the_31_scores_are_packed(device):
    scores = torch.zeros(2**20 + 1, 2**11, dtype=torch.bfloat16, device=device)
    scores[-1, -33:] = 1
    signs, zeros = bits.pack_signs(scores)
    assert zeros == scores.numel() - 33
    assert signs[-1, -2:].tolist() == [-(2**31), -1]
    assert signs[:-1].count_nonzero() == 0
    packed = bits.pack_mask(scores, torch.tensor(1, dtype=torch.bfloat16, device=device), "value")
    assert torch.equal(packed, signs)
