"""Groups of layers, and the effect of a mask on each."""

import copy

import pytest
import torch
from tiny import make_llama, make_rows, masked_llama

from mft.config import MaskConfig, TrainConfig
from mft.config_file import load_config
from mft.evaluation.evaluate import evaluate
from mft.masks.convert import mask_model
from mft.masks.targets import select_targets
from mft.training.loop import finetune, train_masks
from mft_study.sensitivity import (
    Group,
    Sensitivity,
    kind_groups,
    layer_groups,
    layer_sensitivity,
    recommendation,
)

TRAIN = TrainConfig(lr=1e-3, steps=12, batch_size=8)


def row(name, difference, error):
    return Sensitivity(Group(name, (name,), f"mask.layers_to_transform={name}"), 10, 0.1, difference, error, 0.01)


def test_layers_are_grouped_in_order():
    groups = layer_groups(make_llama(), MaskConfig(layers_to_transform=[0, 1, 3]), size=2)
    assert [(g.name, g.override) for g in groups] == [
        ("layers 0-1", "mask.layers_to_transform=0-1"),
        ("layer 3", "mask.layers_to_transform=3"),
    ]
    assert len(groups[0].modules) == 14
    assert all(".layers.3." in name for name in groups[1].modules)
    assert layer_groups(make_llama(), MaskConfig(layers_to_transform=[0, 1, 3]), size=3)[0].name == "layers 0-1,3"


def test_kinds_are_grouped_over_layers():
    groups = {g.name: g for g in kind_groups(make_llama(), MaskConfig(layers_to_transform=[1, 2]))}
    assert set(groups) == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert groups["up_proj"].modules == ("model.layers.1.mlp.up_proj", "model.layers.2.mlp.up_proj")
    assert groups["up_proj"].override == "mask.target_modules=[up_proj]"


def test_an_override_chooses_its_group():
    model = make_llama()
    for group in (*layer_groups(model, MaskConfig(), size=3), *kind_groups(model, MaskConfig())):
        mask = load_config(None, [group.override, "train.epochs=1"]).mask
        assert tuple(select_targets(model, mask)) == group.modules


def test_a_size_of_no_layer_is_refused():
    with pytest.raises(ValueError, match="size must be at least 1, got 0"):
        layer_groups(make_llama(), MaskConfig(), size=0)


def test_a_group_is_measured_against_the_unmasked_model_and_nothing_else_is_touched():
    model, rows = make_llama(), make_rows()
    finetune(model, rows, TrainConfig(lr=1e-2, steps=40, batch_size=8))
    before = copy.deepcopy(model.state_dict())
    mask = MaskConfig(keep_ratio=0.7, init="magnitude")
    groups = layer_groups(model, mask, size=2)
    found = layer_sensitivity(model, rows, rows, mask, groups, TRAIN)
    assert [r.difference for r in found] == sorted(r.difference for r in found)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for r in found:
        assert r.weights == sum(model.get_submodule(name).weight.numel() for name in r.group.modules)
        assert r.flips > 0
        assert r.difference < r.first - 0.0005  # training a mask undoes some of its harm
    upper = next(r for r in found if r.group.name == "layers 2-3")
    masked = copy.deepcopy(model)
    mask_model(masked, MaskConfig(layers_to_transform=[2, 3], keep_ratio=0.7, init="magnitude"))
    start = evaluate(model, rows).loss
    assert upper.first == pytest.approx(evaluate(masked, rows).loss - start, abs=1e-6)
    train_masks(masked, rows, TRAIN)
    assert upper.difference == pytest.approx(evaluate(masked, rows).loss - start, abs=1e-6)


def test_a_masked_model_is_refused():
    with pytest.raises(ValueError, match="masked"):
        layer_sensitivity(masked_llama(), make_rows(), make_rows(), MaskConfig(), [Group("g", (), "")], TRAIN)


def test_many_groups_ask_for_more_evidence():
    one = [row("0", -0.0025, 0.001)]
    assert "1 of 1 groups gain" in recommendation(one)
    assert "None of the 12 groups" in recommendation(one + [row(str(i), 0.0, 0.001) for i in range(1, 12)])
