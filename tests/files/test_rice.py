"""Golomb-Rice streams of matrices of bits: decoding, their size, and what a stranger's stream may ask for."""

import math

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mft.files import rice

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


# ---------------------------------------------------------------------------------------------- streams of strangers


def test_a_stream_cut_off_anywhere_is_refused(monkeypatch):
    monkeypatch.setattr(rice, "BLOCK", 40)  # of 192 words
    stream = rice.encode(drawn(64, 96, 0.1), 96)
    for length in range(len(stream)):
        with pytest.raises(ValueError, match="^stream must "):
            decoded(stream[:length], 64, 96)
    with pytest.raises(ValueError, match=f"stream must end after {len(stream)} bytes, .* got {len(stream) + 1}"):
        decoded(stream + b"\0", 64, 96)


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck), database=None)
@given(st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(0, 255)), min_size=1, max_size=4))
def test_an_edited_stream_is_another_matrix_or_one_error(edits):
    stream = bytearray(rice.encode(drawn(64, 90, 0.05), 90))
    for place, value in edits:
        stream[place % len(stream)] = value
    try:
        words = decoded(bytes(stream), 64, 90)
    except ValueError as error:
        if not str(error).startswith("stream must "):
            raise
        return
    if stream[0] < 64:
        assert np.array_equal(decoded(rice.encode(words, 90), 64, 90), words)
        assert not (words[:, -1] >> 26).any()


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


def test_a_small_stream_cannot_ask_for_much_memory(monkeypatch):
    monkeypatch.setattr(np, "empty", None)  # nothing is allocated
    for rows, columns in ((2**31 - 1, 2**31 - 1), (1 << 20, 1 << 13)):
        with pytest.raises(ValueError, match=rf"stream must have \d+ to \d+ bytes for {rows} x {columns} bits, got 5"):
            decoded(bytes(5), rows, columns)
