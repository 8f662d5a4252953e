"""The statistics of a mask, layer by layer, and the table that shows them."""

import pytest
import torch
from tiny import make_rows, masked_llama
from torch import nn

from mft.config import TrainConfig
from mft.masks.inspection import (
    MaskStatistics,
    combine_statistics,
    flip_share,
    group_by_kind,
    initial_masks,
    kept_weights,
    mask_statistics,
)
from mft.training.loop import train_masks
from mft_kernels import MaskedGroupedLinear, pack_mask


def test_mask_statistics_of_a_worked_example():
    model = masked_llama(layers=[3], keep_ratio=0.75, init="magnitude")
    initial = initial_masks(model)
    rows = mask_statistics(model, initial)
    assert len(rows) == 7
    for row in rows:
        assert row.kept == pytest.approx(0.75)
        assert (row.flips, row.overlap) == (0, 1)


def test_the_magnitude_mask_of_experts_is_each_experts_own():
    """The experts differ in magnitude: as a single matrix, the whole first expert would be dropped."""
    weight = torch.randn(3, 20, 40, generator=torch.Generator().manual_seed(0)) * torch.tensor([[[0.01]], [[1]], [[5]]])
    layer = MaskedGroupedLinear(weight, keep_ratio=0.75)
    (row,) = mask_statistics(nn.ModuleDict({"experts": layer}))
    assert (row.weights, row.kept, row.overlap) == (2400, 0.75, 1)
    with torch.no_grad():
        layer.scores[0] = layer.scores[0].flip(0)
    (row,) = mask_statistics(nn.ModuleDict({"experts": layer}))
    assert 2 / 3 < row.overlap < 0.85


def test_flips_are_counted_against_the_first_mask():
    model = masked_llama(layers=[3])
    initial = initial_masks(model)
    train_masks(model, make_rows(), TrainConfig(lr=1e-2, steps=5))
    for row in mask_statistics(model, initial):
        assert 0 < row.flips < 0.3
        assert row.flips == (model.get_submodule(row.name).mask() != initial[row.name]).float().mean()
        assert row.overlap < 0.6  # random scores do not depend on magnitudes
    assert 0 < flip_share(model, initial) < 0.3
    assert mask_statistics(model)[0].flips is None


def test_layers_that_differ_in_their_numbers_alone_are_one_row():
    names = ["layers.0.up", "layers.0.experts.0.down", "layers.0.experts.1.down", "layers.1.up", "layers.3.up"]
    rows = [MaskStatistics(name, 10, 0.9, 0.1, 0.5) for name in names]
    kinds = [("layers.0-1,3.up", 30), ("layers.0.experts.0-1.down", 20)]
    assert [(row.name, row.weights) for row in group_by_kind(rows)] == kinds


def test_rows_together_are_what_one_layer_of_all_their_weights_would_be():
    """Overlap is a share of the dropped weights: 10 of 100 weights, and 20 of 40."""
    rows = [MaskStatistics("a", 100, 0.9, 0.2, 0.4), MaskStatistics("b", 40, 0.5, 0.05, 1.0)]
    total = combine_statistics(rows, "total")
    assert (total.name, total.weights) == ("total", 140)
    assert (total.kept, total.flips) == (pytest.approx(110 / 140), pytest.approx(22 / 140))
    assert total.overlap == pytest.approx((4 + 20) / 30)
    rows[0].flips = None
    assert combine_statistics(rows, "total").flips is None
    assert combine_statistics([MaskStatistics("all kept", 5, 1.0, 0.0, 1.0)], "total").overlap == 1


def test_kept_weights_count_bits_without_the_padding():
    """Rows that end within a word, words of all ones, and several layers."""
    masks = [torch.rand(5, 45, generator=torch.Generator().manual_seed(0)) > 0.3, torch.ones(2, 64, dtype=torch.bool)]
    packed = [pack_mask(mask.float(), torch.tensor(0.5)) for mask in masks]
    assert kept_weights(packed) == int(masks[0].sum()) + 128
    assert kept_weights(packed[1:]) == 128
