"""Overlap of masks against chance, and flips over training."""

import math

import pytest
import torch
from tiny import make_rows, masked_llama

from mft.config import TrainConfig
from mft.inspection import initial_masks
from mft.overlap import FlipCurve, dropped, flipped, overlap, overlaps, plot_flips, plot_overlaps
from mft.recipe import train_masks


def share(masks, others):
    """Of all weights, those whose bits differ."""
    return sum(int((masks[n] != others[n]).sum()) for n in masks) / sum(m.numel() for m in masks.values())


def marked(*places, size=10):
    mask = torch.zeros(1, size, dtype=torch.bool)
    mask[0, list(places)] = True
    return mask


def test_a_worked_example():
    """A drops 4 of 10 and B 5, sharing 2: 2 / 7. By chance 4 * 5 / 10 = 2 would be shared, of 7."""
    found = overlap({"a": marked(0, 1, 2, 3)}, {"a": marked(2, 3, 4, 5, 6)})
    assert (found.jaccard, found.chance) == pytest.approx((2 / 7, 2 / 7))
    assert found.beyond_chance == pytest.approx(0)


def test_chance_is_counted_layer_by_layer():
    """Both drop one whole layer: certain to agree there, whatever the other layer's size."""
    a = {"small": marked(*range(4), size=4), "large": marked(0, size=100)}
    b = {"small": marked(*range(4), size=4), "large": marked(1, size=100)}
    found = overlap(a, b)
    assert found.jaccard == pytest.approx(4 / 6)
    assert found.chance == pytest.approx(4.01 / (10 - 4.01))


def test_independent_sets_overlap_as_chance_says():
    generator = torch.Generator().manual_seed(0)
    a, b = ({"w": torch.rand(400, 500, generator=generator) < share} for share in (0.1, 0.3))
    found = overlap(a, b)
    assert found.jaccard == pytest.approx(found.chance, rel=0.03)
    assert abs(found.beyond_chance) < 0.005


def test_equal_sets_overlap_wholly_and_empty_ones_not_at_all():
    a = {"w": marked(1, 2)}
    assert overlap(a, a).jaccard == overlap(a, a).beyond_chance == 1
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


def test_flips_and_drops_come_from_masks():
    first, last = {"w": ~marked(0, 1)}, {"w": ~marked(1, 2)}
    assert torch.equal(dropped(last)["w"], marked(1, 2))
    assert torch.equal(flipped(last, first)["w"], marked(0, 2))


def test_the_flip_curve_follows_training():
    model = masked_llama(init="magnitude")
    curve = FlipCurve(model, every=2)
    masks = [initial_masks(model)]

    def on_step(report):
        curve(report)
        masks.append(initial_masks(model))

    train_masks(model, make_rows(), TrainConfig(lr=3e-3, steps=5), on_step=on_step)
    assert curve.steps == [2, 4, 5]
    assert curve.from_start == [share(masks[step], masks[0]) for step in (2, 4, 5)]
    assert curve.from_start[-1] > 0
    since = [(2, 0), (4, 2), (5, 4)]
    assert curve.a_step == [share(masks[now], masks[then]) / (now - then) for now, then in since]


def test_plots_are_written(tmp_path):
    found = overlaps({name: {"w": marked(i, i + 1)} for i, name in enumerate(("seed 0", "seed 1", "seed 2"))})
    plot_overlaps(found, tmp_path / "overlap.png", title="Dropped weights")
    model = masked_llama(init="magnitude")
    curve = FlipCurve(model)
    train_masks(model, make_rows(), TrainConfig(lr=3e-3, steps=3), on_step=curve)
    plot_flips({"seed 0": curve}, tmp_path / "flips.png")
    assert min((tmp_path / name).stat().st_size for name in ("overlap.png", "flips.png")) > 5000
