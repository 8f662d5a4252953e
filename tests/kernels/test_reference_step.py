"""The formats of the reference's score_step: random words, 8-bit moments and 16-bit scores."""

import math

import pytest
import torch
from score_steps import MEAN, SQUARE, Matrix

from mft_kernels import float_from_fixed
from mft_kernels.reference.step import decode, encode, narrow_scores, philox, random_words


def test_philox_gives_the_published_words():
    # Random123's kat_vectors, philox4x32 with 10 rounds.
    def words(counter, seed):
        return [int(w) for w in philox(*(torch.tensor(c) for c in counter), seed)]

    assert words((0, 0, 0, 0), 0) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    ones = 0xFFFFFFFF
    assert words((ones,) * 4, 2**64 - 1) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    assert words(pi, 0x299F31D0_A4093822) == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]


def test_each_element_has_the_word_that_the_layout_gives_it():
    seed, step, device = 5 << 33 | 9, 12, torch.device("cpu")
    words = random_words(3000, seed, step, device)
    for i in (0, 1, 255, 256, 1023, 1024, 1700, 2999):
        chunk, r = divmod(i, 1024)
        counter = (torch.tensor(chunk * 256 + r % 256), torch.tensor(0), torch.tensor(step), torch.tensor(0))
        assert words[i] == philox(*counter, seed)[r // 256]
    assert words.unique().numel() == 3000
    assert not torch.equal(words, random_words(3000, seed, step + 1, device))
    assert not torch.equal(words, random_words(3000, seed + (1 << 32), step, device))


# ---------------------------------------------------------------------------------------------- 8-bit moments


@pytest.mark.parametrize(("bias", "count"), [MEAN, SQUARE])
def test_minifloat_codes_stand_for_their_values(bias, count):
    codes = torch.arange(256, dtype=torch.uint8)
    values = decode(codes, torch.ones(1), bias, count)
    for code in range(count):
        e, f = divmod(code, 8)
        assert values[code].item() == (f / 8 * 2.0 ** (1 - bias) if e == 0 else (1 + f / 8) * 2.0 ** (e - bias))
    if count == 128:
        assert torch.equal(values[128:], -values[:128])
    assert values.max() == 1.875


@pytest.mark.parametrize(("bias", "count"), [MEAN, SQUARE])
@pytest.mark.parametrize("word", [0, 255])
def test_a_value_that_has_a_code_keeps_it_whatever_the_random_bits(bias, count, word):
    codes = torch.arange(256, dtype=torch.uint8)
    values = decode(codes, torch.full((1,), 3.0), bias, count)
    scale = torch.zeros(1)
    assert torch.equal(encode(values, scale, torch.full((256,), word), bias, count), codes)
    assert scale == 3.0


@pytest.mark.parametrize(("bias", "count"), [MEAN, SQUARE])
def test_8_bit_rounding_errs_by_less_than_a_step_of_the_code(bias, count):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64 * 256, generator=generator) * torch.randn(64 * 256, generator=generator).mul(4).exp()
    x = x if count == 128 else x.abs()
    scale = torch.zeros(64)
    codes = encode(x, scale, torch.randint(256, x.shape, generator=generator), bias, count)
    error = (decode(codes, scale, bias, count) - x).abs()
    least = scale.repeat_interleave(256) * 2.0 ** (1 - bias)
    assert (error <= torch.maximum(x.abs(), least) / 8 * 1.001).all()
    assert torch.equal(scale, x.view(64, 256).abs().amax(1) / 1.875)


@pytest.mark.parametrize(("bias", "count"), [MEAN, SQUARE])
def test_8_bit_rounding_is_unbiased(bias, count):
    # With all 256 words once, the mean is exact up to 1/512 of a step, to which a probability is rounded.
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(256, generator=generator) * torch.randn(256, generator=generator).mul(5).exp()
    x[0] = x.max() * 2
    scale, total = torch.zeros(1), torch.zeros(256, dtype=torch.float64)
    for word in range(256):
        total += decode(encode(x, scale, torch.full((256,), word), bias, count), scale, bias, count)
    step = torch.maximum(2.0 ** (x / scale).log2().floor(), torch.tensor(2.0 ** (1 - bias))) / 8 * scale
    error = (total / 256 - x) / step
    rounds_freely = x >= step if count == 256 else x > 0  # a square below the smallest code becomes that code
    assert rounds_freely.sum() > 200
    assert error[rounds_freely].abs().max() <= 1 / 512 + 1e-4


def test_a_positive_square_is_never_coded_0():
    x = torch.tensor([1.0, 1e-12, 1e-30, 0.0])
    scale = torch.zeros(1)
    assert encode(x, scale, torch.zeros(4, dtype=torch.int64), *SQUARE).tolist() == [255, 1, 1, 0]
    assert encode(x, scale, torch.zeros(4, dtype=torch.int64), *MEAN).tolist() == [127, 0, 0, 0]


def test_a_block_of_zeros_or_of_nothing_normal_is_coded_0_and_a_nan_spoils_its_block_alone():
    x = torch.zeros(3 * 256)
    x[256:512] = 1e-38
    x[-1], x[-2] = torch.nan, 1.0
    scale = torch.ones(3)
    codes = encode(x, scale, torch.full(x.shape, 255), *MEAN)
    assert not codes.any()
    assert torch.equal(scale[:2], torch.zeros(2))
    assert scale[2].isnan()


def test_an_infinite_moment_saturates_at_2_to_the_126():
    x = torch.tensor([torch.inf, -torch.inf, 2.0**126, 0.0])
    scale = torch.zeros(1)
    codes = encode(x, scale, torch.zeros(4, dtype=torch.int64), *MEAN)
    assert codes.tolist() == [127, 255, 127, 0]
    assert scale == torch.tensor(2.0**126) / 1.875


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("zeros", [0.0, 0.95])
def test_8_bit_moments_give_no_update_that_adamw_could_not_give(size, zeros):
    # In AdamW |m| <= 7.3 sqrt(v), whatever the gradients; here one block mixes gradients of very different sizes.
    matrix = Matrix(16, 512, moments="8bit")
    sizes = size * (2 * matrix.normal(1, 512)).exp()
    for i in range(1, 101):
        before = matrix.scores.clone()
        grad = sizes * matrix.normal(16, 512) * (torch.rand(16, 512, generator=matrix.generator) >= zeros)
        matrix.step(grad, i, lr=1e-6)
        assert (matrix.scores - before).abs().max() <= 8e-6


# ---------------------------------------------------------------------------------------------- narrow scores


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int16])
def test_the_rounding_of_scores_is_unbiased(dtype):
    generator = torch.Generator().manual_seed(2)
    wide = 0.02 * torch.randn(500, generator=generator)
    old = torch.zeros(500).to(dtype)
    total = torch.zeros(500, dtype=torch.float64)
    words = range(0, 65536, 64)  # every 64th word: then the mean is exact up to 1/1024 of a step
    for word in words:
        rounded = narrow_scores(wide, old, torch.full((500,), word))
        total += float_from_fixed(rounded) if dtype == torch.int16 else rounded.float()
    step = torch.tensor(2.0**-18) if dtype == torch.int16 else 2.0 ** (wide.abs().log2().floor() - 7)
    assert ((total / len(words) - wide).abs() / step).max() <= 1 / 1000


def test_fixed_point_saturates_and_shows_what_is_not_finite():
    wide = torch.tensor([0.2, -0.2, 31743 * 2.0**-18, torch.inf, -torch.inf, torch.nan])
    codes = narrow_scores(wide, torch.zeros(6, dtype=torch.int16), torch.zeros(6, dtype=torch.int64))
    assert [c & 0xFFFF for c in codes.tolist()] == [31743, 31743 | 0x8000, 31743, 0x7C00, 0xFC00, 0x7C00]
    bf16 = narrow_scores(wide, torch.zeros(6).bfloat16(), torch.full((6,), 0xFFFF))
    assert bf16[3:5].tolist() == [math.inf, -math.inf]
    assert bf16[5].isnan()


@pytest.mark.parametrize("scores", [torch.bfloat16, torch.int16])
def test_a_step_far_below_a_score_s_precision_is_taken_on_average(scores):
    matrix = Matrix(64, 1024, scores, weight=None)
    before = matrix.floats().double()
    for i in range(1, 51):
        matrix.step(torch.ones(64, 1024), i, lr=1e-7, mode="value")
    moved = (matrix.floats().double() - before).mean().item()
    assert moved == pytest.approx(-50e-7, rel=0.1)
