"""Messages of clients: masks and signs are decoded again, and how many bytes are sent."""

import numpy as np
import pytest

from benchmarks.regimes.messages import decode_mask, decode_signs, encode_mask, encode_signs, encode_with_feedback


@pytest.mark.parametrize("shape", [(1, 1), (3, 32), (5, 33), (4, 6, 40), (40, 700)])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 1.0])
def test_a_mask_comes_back_from_what_was_known(shape, share):
    generator = np.random.default_rng(0)
    mask, known = generator.random(shape) >= share, generator.random(shape) >= 0.3
    for before in (None, known):
        message = encode_mask(mask, before)
        assert message.dtype == np.uint8
        assert np.array_equal(decode_mask(message, shape, before), mask)


@pytest.mark.parametrize(("dropped", "bits"), [(0.0, 0.002), (0.01, 0.09), (0.1, 0.5), (0.5, 1.001)])
def test_a_message_takes_about_the_entropy_of_what_changed(dropped, bits):
    mask = np.random.default_rng(0).random((512, 512)) >= dropped
    assert 8 * len(encode_mask(mask)) <= bits * mask.size
    assert 8 * len(encode_mask(mask, known=mask)) <= 0.002 * mask.size  # a few bytes: nothing changed


def test_signs_come_back_with_one_scale():
    update = np.array([[1.0, -2.0, 0.0], [3.0, -3.0, 3.0]], np.float32)
    message = encode_signs(update)
    assert len(message) == 4 + 1
    assert decode_signs(message, update.shape).tolist() == [[2, -2, 2], [2, -2, 2]]


def test_error_feedback_sends_in_the_end_what_the_signs_left_out():
    update, error, sent = np.array([1.0, 0.5, -0.25, 0.0]), np.zeros(4), np.zeros(4)
    for _ in range(64):
        message, error = encode_with_feedback(update, error)
        sent += decode_signs(message, update.shape)
    assert sent / 64 == pytest.approx(update, abs=0.05)
    assert sent + error == pytest.approx(64 * update)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: encode_mask(np.ones((2, 2)), np.ones((2, 3))), r"known must have the shape of mask \(2, 2\)"),
        (lambda: encode_signs([1.0, np.nan]), "update must be finite, got nan"),
        (lambda: decode_signs(np.zeros(4, np.uint8), (9,)), r"message must have 6 bytes for the shape \(9,\), got 4"),
        (lambda: decode_mask(np.zeros(3, np.uint8), (64, 64)), "stream must"),
    ],
)
def test_what_does_not_fit_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()
