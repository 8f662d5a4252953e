"""A server's aggregation: probabilities from masks, a majority of signs, a mean of updates."""

import numpy as np
import pytest

from benchmarks.regimes.aggregate import keep_probabilities, majority_mask, majority_sign, mean_update, sample_mask

MASKS = [[[1, 1], [0, 0]], [[1, 0], [0, 1]], [[1, 0], [0, 0]], [[1, 1], [0, 0]]]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [[1, 0.5], [0, 0.25]]),
        ({"before": np.full((2, 2), 0.5), "strength": 4}, [[0.75, 0.5], [0.25, 0.375]]),
        ({"before": np.full((2, 2), 0.5)}, [[1, 0.5], [0, 0.25]]),
    ],
)
def test_votes_and_what_came_before_make_a_probability(options, expected):
    assert keep_probabilities(MASKS, **options).tolist() == expected


def test_half_of_the_votes_keep_a_weight():
    assert majority_mask(keep_probabilities(MASKS)).tolist() == [[True, True], [False, False]]


def test_sampled_masks_keep_each_weight_with_its_probability():
    probabilities = np.array([0.0, 0.3, 1.0])
    generator = np.random.default_rng(0)
    mean = np.mean([sample_mask(probabilities, generator) for _ in range(4000)], axis=0)
    assert mean == pytest.approx(probabilities, abs=0.03)


def test_the_majority_of_signs_and_the_mean_of_updates():
    updates = [[3.0, -1.0, 1.0], [-1.0, -1.0, -1.0], [-1.0, 5.0, 0.0]]
    assert majority_sign(updates).tolist() == [-1, -1, 0]
    assert mean_update(updates[:2]).tolist() == [1, -1, 0]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: keep_probabilities([]), "masks must hold the array of at least one client"),
        (lambda: keep_probabilities([[1, 0], [1]]), "masks must have one shape, got"),
        (lambda: keep_probabilities(MASKS, strength=1), "before must be given with strength 1"),
        (lambda: keep_probabilities(MASKS, strength=-1), "strength must be at least 0"),
        (lambda: keep_probabilities([[1]], before=[1.5], strength=1), r"before must lie in \[0, 1\]"),
        (lambda: keep_probabilities([[1]], before=[1, 1], strength=1), "before must have the shape of the masks"),
    ],
)
def test_what_does_not_fit_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()
