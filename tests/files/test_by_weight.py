"""Streams in the order of |weight|: decoding, their savings, and what a stranger's stream may ask for."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mft.files import by_weight, rice


def weight_of(rows, columns, dtype=torch.bfloat16, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)


def dropped_by(weight, seed=0):
    """Return words in which small weights are dropped most often, a few per cent of all."""
    size = weight.float().abs().numpy()
    return rice.words_of(np.random.default_rng(seed).random(size.shape) > 0.5 * np.exp(-size / 0.05))


def decoded(stream, weight):
    return by_weight.decode(np.frombuffer(stream, np.uint8), *weight.shape, weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn])
def test_every_bit_comes_back_whatever_shape_dtype_and_section(dtype, monkeypatch):
    monkeypatch.setattr(rice, "BLOCK", 16)
    monkeypatch.setattr(by_weight, "_SMALLEST", 2)
    for rows, columns in ((1, 1), (1, 31), (3, 32), (5, 33), (40, 40), (2, 700), (16, 33), (64, 96)):
        weight = weight_of(rows, columns, dtype)
        words = dropped_by(weight)
        stream = by_weight.encode(words, columns, weight)
        by_weight.check_length(len(stream), rows, columns)
        assert len(stream) <= by_weight.most_bytes(rows, columns)
        assert np.array_equal(decoded(stream, weight), words)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 1.0])
def test_bits_that_do_not_depend_on_the_weight_take_little_more_than_in_rice(share):
    weight = weight_of(256, 500)
    words = rice.words_of(np.random.default_rng(1).random((256, 500)) < share)
    stream = by_weight.encode(words, 500, weight)
    assert np.array_equal(decoded(stream, weight), words)
    assert len(stream) <= len(rice.encode(words, 500)) + 6 * (5 + 2)  # headers of six blocks, and bits that fill bytes


def test_masks_that_drop_small_weights_take_fewer_bytes():
    weight = weight_of(512, 1024)
    words = dropped_by(weight)
    assert len(by_weight.encode(words, 1024, weight)) < 0.7 * len(rice.encode(words, 1024))


def test_zeros_signs_and_weights_that_are_not_finite_have_a_place_too():
    weight = torch.tensor([[0.0, -0.0, torch.inf, -torch.inf, torch.nan, -torch.nan, 1e-45, -1.0]]).repeat(5, 5)
    words = dropped_by(weight_of(5, 40))
    assert np.array_equal(decoded(by_weight.encode(words, 40, weight), weight), words)
    assert by_weight.encode(words, 40, weight) == by_weight.encode(words, 40, -weight)


def test_a_stream_is_these_bytes_for_ever():
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


# ---------------------------------------------------------------------------------------------- streams of strangers

WEIGHT = weight_of(64, 90)


def test_a_stream_cut_off_anywhere_is_refused(monkeypatch):
    monkeypatch.setattr(by_weight, "_SMALLEST", 30)
    stream = by_weight.encode(dropped_by(WEIGHT), 90, WEIGHT)
    for length in range(len(stream)):
        with pytest.raises(ValueError, match="^stream must "):
            decoded(stream[:length], WEIGHT)
    with pytest.raises(ValueError, match=f"stream must end after {len(stream)} bytes, .* got {len(stream) + 1}"):
        decoded(stream + b"\0", WEIGHT)


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck), database=None)
@given(st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(0, 255)), min_size=1, max_size=4))
def test_an_edited_stream_is_another_matrix_or_one_error(edits):
    stream = bytearray(by_weight.encode(dropped_by(WEIGHT), 90, WEIGHT))
    for place, value in edits:
        stream[place % len(stream)] = value
    try:
        words = decoded(bytes(stream), WEIGHT)
    except ValueError as error:
        if not str(error).startswith("stream must "):
            raise
        return
    assert np.array_equal(decoded(by_weight.encode(words, 90, WEIGHT), WEIGHT), words)
    assert not (words[:, -1] >> 26).any()


def test_words_as_they_are_have_0_past_the_last_weight():
    stream = bytearray(by_weight.encode(dropped_by(weight_of(1, 40), 3) & 0x5A3C0F69, 40, weight_of(1, 40)))
    raw = b"\x40\0\0\0\0" + b"\x35\xc9\x5a\x96\x35\x01\0\0"
    assert len(stream) > 5
    with pytest.raises(ValueError, match="stream must have 0 in the 24 bits that fill up its last word"):
        decoded(raw, weight_of(1, 40))
    raw = raw.replace(b"\x01\0\0", b"\0\0\0")
    assert decoded(raw, weight_of(1, 40)).any()


def test_a_small_stream_cannot_ask_for_much_memory(monkeypatch):
    monkeypatch.setattr(rice, "decode", None)  # nothing is allocated
    for rows, columns in ((2**31 - 1, 2**31 - 1), (1 << 20, 1 << 13)):
        with pytest.raises(ValueError, match=r"stream must have \d+ to \d+ bytes for .* bits, got 5"):
            by_weight.decode(np.zeros(5, np.uint8), rows, columns, WEIGHT)
