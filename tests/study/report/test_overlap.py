"""Overlap of masks compared with chance."""

import math

import pytest
import torch

from mft_study.report.pictures.overlap import overlap, overlaps


def marked(*places, size=10):
    mask = torch.zeros(1, size, dtype=torch.bool)
    mask[0, list(places)] = True
    return mask


def test_a_worked_example():
    """A drops 4 of 10 and B drops 5; they share 2 of 7: 2 / 7. By chance they share 4 * 5 / 10 = 2 of 7 too."""
    found = overlap({"a": marked(0, 1, 2, 3)}, {"a": marked(2, 3, 4, 5, 6)})
    assert (found.jaccard, found.chance) == pytest.approx((2 / 7, 2 / 7))


def test_chance_is_counted_layer_by_layer():
    """Both drop all of one layer, so they must agree there, whatever the other layer's size."""
    a = {"small": marked(*range(4), size=4), "large": marked(0, size=100)}
    b = {"small": marked(*range(4), size=4), "large": marked(1, size=100)}
    found = overlap(a, b)
    assert found.jaccard == pytest.approx(4 / 6)
    assert found.chance == pytest.approx(4.01 / (10 - 4.01))


def test_equal_sets_overlap_wholly_and_empty_ones_not_at_all():
    a = {"w": marked(1, 2)}
    assert overlap(a, a).jaccard == 1
    assert math.isnan(overlap({"w": marked()}, {"w": marked()}).jaccard)


def test_sets_of_other_layers_are_refused():
    with pytest.raises(ValueError, match="same layers in the same shapes .* got 1 layers and 1"):
        overlap({"a": marked(1)}, {"b": marked(1)})
    with pytest.raises(ValueError, match="same layers in the same shapes"):
        overlap({"a": marked(1)}, {"a": marked(1, size=11)})


def test_every_pair_is_compared_once():
    a, b, c = ({"w": marked(i, i + 1)} for i in range(3))
    found = overlaps({"a": a, "b": b, "c": c})
    assert list(found) == [("a", "b"), ("a", "c"), ("b", "c")]
    assert found["a", "b"].jaccard == pytest.approx(1 / 3)
    assert found["a", "c"].jaccard == 0
