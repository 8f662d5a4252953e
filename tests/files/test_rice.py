"""Golomb-Rice streams of matrices of bits, also in the order of |weight|: decoding, size, and those of strangers."""

import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mft.files import by_weight, rice

SHARES = (0.0, 0.0005, 0.01, 0.025, 0.1, 0.2, 0.38, 0.5, 0.7, 0.99, 1.0)


def drawn(rows, columns, share, seed=0):
    return rice.words_of(np.random.default_rng(seed).random((rows, columns)) < share)


def decoded(stream, rows, columns):
    return rice.decode(np.frombuffer(stream, np.uint8), rows, columns)


def entropy(share):
    return -sum(p * math.log2(p) for p in (share, 1 - share) if p)


@pytest.mark.parametrize("share", SHARES)
def test_every_bit_comes_back_whatever_the_shape_and_wherever_blocks_end(share, monkeypatch):
    monkeypatch.setattr(rice, "BLOCK", 7)
    for rows, columns in ((1, 1), (1, 31), (3, 32), (5, 33), (40, 40), (2, 700), (9, 224), (64, 96)):
        words = drawn(rows, columns, share, seed=rows)
        stream = rice.encode(words, columns)
        assert rice.fewest_bytes(rows, columns) <= len(stream) <= rice.most_bytes(rows, columns)
        assert np.array_equal(decoded(stream, rows, columns), words)


def test_a_stream_is_these_bytes_for_ever():
    """Two dropped of 40 columns; then two kept of 33, with padding in between; then words as they are."""
    dropped = np.ones((2, 40), bool)
    dropped[0, 3] = dropped[1, 17] = False
    assert rice.encode(rice.words_of(dropped), 40).hex() == "0402000000" + "53" + "11"  # gaps 3 = 0|3, 53 = 3|5
    kept = ~np.ones((2, 33), bool)
    kept[0, 32] = kept[1, 0] = True
    assert rice.encode(rice.words_of(kept), 33).hex() == "2402000000" + "00" + "0c"  # gaps 32 = 2|0, 0 = 0|0
    raw = np.frombuffer(b"\x35\xc9\x5a\x96", "<u4")[None]
    assert rice.encode(raw, 32).hex() == "4000000000" + "35c95a96"


@pytest.mark.parametrize(("share", "most"), [(0.0005, 1.02), (0.01, 1.006), (0.025, 1.012), (0.1, 1.02), (0.38, 1.05)])
def test_a_stream_is_about_as_long_as_the_entropy_of_independent_bits(share, most):
    words = drawn(1024, 2048, share)
    share = float(np.unpackbits(words.view(np.uint8)).mean())
    for matrix in (words, ~words):
        assert 8 * len(rice.encode(matrix, 2048)) < most * 2**21 * entropy(share)


def test_blocks_of_agreed_lengths_suit_bits_that_are_rarer_in_some_places():
    dense, sparse = drawn(4, 4096, 0.3, seed=1), drawn(60, 4096, 0.001, seed=2)
    words, blocks = np.concatenate([dense, sparse]), [4 * 128, 60 * 128]
    stream = rice.encode(words, 4096, blocks)
    assert np.array_equal(rice.decode(np.frombuffer(stream, np.uint8), 64, 4096, blocks), words)
    assert len(stream) < 0.6 * len(rice.encode(words, 4096))
    with pytest.raises(ValueError, match="^stream must "):
        decoded(stream, 64, 4096)


def test_a_matrix_of_one_value_takes_a_1024th_of_its_words():
    for words in (np.zeros((4096, 64), "<u4"), np.full((4096, 64), 2**32 - 1, "<u4")):
        stream = rice.encode(words, 2048)
        assert len(stream) == words.nbytes // 1024
        assert np.array_equal(decoded(stream, 4096, 2048), words)


def weight_of(rows, columns, dtype=torch.bfloat16, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)


def dropped_by(weight, seed=0):
    """Return words in which small weights are dropped most often, a few per cent of all."""
    size = weight.float().abs().numpy()
    return rice.words_of(np.random.default_rng(seed).random(size.shape) > 0.5 * np.exp(-size / 0.05))


def weighed(stream, weight):
    return by_weight.decode(np.frombuffer(stream, np.uint8), *weight.shape, weight)


# ---------------------------------------------------------------------------------------------- by weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn])
def test_by_weight_every_bit_comes_back_whatever_shape_dtype_and_section(dtype, monkeypatch):
    monkeypatch.setattr(rice, "BLOCK", 16)
    monkeypatch.setattr(by_weight, "_SMALLEST", 2)
    for rows, columns in ((1, 1), (1, 31), (3, 32), (5, 33), (40, 40), (2, 700), (16, 33), (64, 96)):
        weight = weight_of(rows, columns, dtype)
        words = dropped_by(weight)
        stream = by_weight.encode(words, columns, weight)
        by_weight.check_length(len(stream), rows, columns)
        assert len(stream) <= by_weight.most_bytes(rows, columns)
        assert np.array_equal(weighed(stream, weight), words)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 1.0])
def test_bits_that_do_not_depend_on_the_weight_take_little_more_than_in_rice(share):
    weight = weight_of(256, 500)
    words = rice.words_of(np.random.default_rng(1).random((256, 500)) < share)
    stream = by_weight.encode(words, 500, weight)
    assert np.array_equal(weighed(stream, weight), words)
    assert len(stream) <= len(rice.encode(words, 500)) + 6 * (5 + 2)  # headers of six blocks, and bits that fill bytes


def test_masks_that_drop_small_weights_take_fewer_bytes():
    weight = weight_of(512, 1024)
    words = dropped_by(weight)
    assert len(by_weight.encode(words, 1024, weight)) < 0.7 * len(rice.encode(words, 1024))


def test_zeros_signs_and_weights_that_are_not_finite_have_a_place_too():
    weight = torch.tensor([[0.0, -0.0, torch.inf, -torch.inf, torch.nan, -torch.nan, 1e-45, -1.0]]).repeat(5, 5)
    words = dropped_by(weight_of(5, 40))
    assert np.array_equal(weighed(by_weight.encode(words, 40, weight), weight), words)
    assert by_weight.encode(words, 40, weight) == by_weight.encode(words, 40, -weight)


def test_a_stream_by_weight_is_these_bytes_for_ever():
    """The two dropped weights, in columns 1 and 38, are the two smallest: 0 and 1 in the order."""
    weight = torch.arange(40.0, 0, -1)[None].clone()
    weight[0, 1] = -0.25
    weight[0, 38], weight[0, 39] = 0.5, 3
    kept = np.ones((1, 40), bool)
    kept[0, [1, 38]] = False
    # gaps 0 = 0|0, 0 = 0|0
    assert by_weight.encode(rice.words_of(kept), 40, weight).hex() == "0302000000" + "00" + "03"


def test_the_order_of_equal_weights_is_that_of_the_matrix():
    words = dropped_by(weight_of(8, 64))
    same = torch.full((8, 64), 0.5)
    assert by_weight.encode(words, 64, same) == rice.encode(words.reshape(1, -1), 512)


def test_words_as_they_are_have_0_past_the_last_weight():
    stream = bytearray(by_weight.encode(dropped_by(weight_of(1, 40), 3) & 0x5A3C0F69, 40, weight_of(1, 40)))
    raw = b"\x40\0\0\0\0" + b"\x35\xc9\x5a\x96\x35\x01\0\0"
    assert len(stream) > 5
    with pytest.raises(ValueError, match="stream must have 0 in the 24 bits that fill up its last word"):
        weighed(raw, weight_of(1, 40))
    raw = raw.replace(b"\x01\0\0", b"\0\0\0")
    assert weighed(raw, weight_of(1, 40)).any()


# ---------------------------------------------------------------------------------------------- streams of strangers

WEIGHT = weight_of(64, 90)
# The words, their stream, and how one is decoded.
CODINGS = {
    "rice": (drawn(64, 90, 0.05), lambda words: rice.encode(words, 90), lambda stream: decoded(stream, 64, 90)),
    "by weight": (
        dropped_by(WEIGHT),
        lambda words: by_weight.encode(words, 90, WEIGHT),
        lambda stream: weighed(stream, WEIGHT),
    ),
}


@pytest.mark.parametrize("coding", CODINGS)
def test_a_stream_cut_off_anywhere_is_refused(coding, monkeypatch):
    monkeypatch.setattr(rice, "BLOCK", 40)  # of 192 words
    monkeypatch.setattr(by_weight, "_SMALLEST", 30)
    words, encode, decode = CODINGS[coding]
    stream = encode(words)
    for length in range(len(stream)):
        with pytest.raises(ValueError, match="^stream must "):
            decode(stream[:length])
    with pytest.raises(ValueError, match=f"stream must end after {len(stream)} bytes, .* got {len(stream) + 1}"):
        decode(stream + b"\0")


@pytest.mark.parametrize("coding", CODINGS)
@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck), database=None)
@given(edits=st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(0, 255)), min_size=1, max_size=4))
def test_an_edited_stream_is_another_matrix_or_one_error(coding, edits):
    words, encode, decode = CODINGS[coding]
    stream = bytearray(encode(words))
    for place, value in edits:
        stream[place % len(stream)] = value
    try:
        words = decode(bytes(stream))
    except ValueError as error:
        if not str(error).startswith("stream must "):
            raise
        return
    if coding == "by weight" or stream[0] < 64:
        assert np.array_equal(decode(encode(words)), words)
        assert not (words[:, -1] >> 26).any()


@pytest.mark.parametrize("sizes", [(2**31 - 1, 2**31 - 1), (1 << 20, 1 << 13)])
def test_a_small_stream_cannot_ask_for_much_memory(sizes, monkeypatch):
    stream = np.zeros(5, np.uint8)
    monkeypatch.setattr(np, "empty", None)  # nothing is allocated
    message = r"stream must have \d+ to \d+ bytes for .* bits, got 5"
    with pytest.raises(ValueError, match=message):
        rice.decode(stream, *sizes)
    with pytest.raises(ValueError, match=message):
        by_weight.decode(stream, *sizes, WEIGHT)


def head(kind, count, rest=b""):
    return (bytes([kind]) + count.to_bytes(4, "little") + rest).ljust(rice.fewest_bytes(64, 96), b"\0")


@pytest.mark.parametrize(
    ("stream", "message"),
    [
        (head(65, 0), "known kinds and counts up to 6144, got 65 and 0"),
        (head(23, 0), "known kinds and counts up to 267, got 23 and 0"),
        (head(64, 1, bytes(768)), "known kinds and counts up to 0, got 64 and 1"),
        (head(0, 6145, b"\xff" * 760), "known kinds and counts up to 6144, got 0 and 6145"),
        (head(0, 2**32 - 1, b"\xff" * 760), "got 0 and 4294967295"),
        (head(64, 0, bytes(767)), "768 bytes of words, got 767"),
        (head(22, 2, b"\xff" * 5 + b"\x0f\3"), "gaps within 6144 columns, got 8388607"),
        (head(1, 2, b"\0" * 387 + b"\3"), "2 gaps before word 192, got fewer, or too long ones"),
        (head(32, 2, b"\2"), "2 gaps before word 192, got fewer"),
        (head(32, 2, b"\7"), "0 in what fills up its bytes"),
        (head(33, 1, b"\2\1"), "1 gaps before word 192"),
        (head(32, 1, b"\1\1"), "end after 6 bytes, with 0 from 6 on, got 7"),
    ],
)
def test_what_no_encoder_writes_is_named(stream, message):
    with pytest.raises(ValueError, match=f"stream must .*{message}"):
        decoded(stream, 64, 96)


def test_what_makes_a_stream_long_enough_is_0():
    stream = bytearray(rice.encode(np.zeros((4096, 64), "<u4"), 2048))
    stream[-1] = 1
    with pytest.raises(ValueError, match="stream must end after 1024 bytes, with 0 from 10 on, got 1024"):
        decoded(stream, 4096, 2048)
