"""mask.pattern through the recipe: configuration, models, training in each memory mode, exports and one-shot masks."""

import json

import pytest
import torch
from tiny import make_gpt2, make_llama, make_rows, masked_llama, padded_rows
from tiny_study import STUDY, make_study
from tiny_ways import TOLERANCE, masked_mixture, masks_of, scores_of

from mft.config import IMPORTANCE_METHODS, MaskConfig, TrainConfig
from mft.config_file import load_config
from mft.engines.plain import PlainStates
from mft.importance.importance import importance
from mft.importance.initial_scores import initialise_scores, mask_from_data
from mft.masks.convert import keep_all_weights, mask_model, masked_modules
from mft.masks.export import load_masks, save_masks
from mft.masks.export_format import read_description
from mft.masks.peft import MaskPeftConfig
from mft.training.best import put_result
from mft.training.loop import train_masks
from mft_study.arms.kinds import make_arm
from mft_study.load import load_study, study_values
from mft_study.one_shot import one_shot_mask

PATTERNS = {"row": 0.7, "2:4": 0.5, "4:8": 0.5}


def assert_follows(mask, pattern):
    """Assert that each group of a mask (N, K) keeps as many weights as the pattern says."""
    columns = mask.shape[1]
    kept, size = (columns - int((1 - 0.7) * columns), columns) if pattern == "row" else map(int, pattern.split(":"))
    assert (mask.view(-1, size).sum(1) == kept).all()


def patterned(pattern, **mask):
    return MaskConfig(layers_to_transform=[2, 3], keep_ratio=PATTERNS[pattern], pattern=pattern, **mask)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"pattern": "1:2"}, "pattern must be one of matrix, row, 2:4, 4:8, got '1:2'"),
        ({"pattern": "row"}, r"pattern must be matrix without keep_ratio, .* \(keep_ratio=0.5\?\), got row"),
        ({"pattern": "2:4", "keep_ratio": 0.6}, r"keep_ratio must be 0.5 or left out with pattern = 2:4 .*got 0.6"),
        ({"pattern": "2:4", "budget": 0.1}, "pattern must be matrix without keep_ratio"),
        ({"pattern": "2:4", "threshold": 0.1}, "pattern must be matrix without keep_ratio"),
    ],
)
def test_a_configuration_that_no_mask_can_follow_is_an_error(values, message):
    with pytest.raises(ValueError, match=message):
        MaskConfig(**values)


def test_a_pattern_of_half_needs_no_keep_ratio(tmp_path):
    assert (MaskConfig(pattern="2:4").keep_ratio, MaskConfig(pattern="2:4").mode) == (0.5, "magnitude")
    path = tmp_path / "run.yaml"
    path.write_text("mask: {pattern: '4:8'}\n")
    mask = load_config(path).mask
    assert (mask.pattern, mask.keep_ratio, mask.budget, mask.mode) == ("4:8", 0.5, None, "magnitude")
    path.write_text("mask: {pattern: matrix}\n")
    assert load_config(path).mask == load_config(None).mask


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("make", [make_llama, make_gpt2])
def test_rows_are_outputs_and_groups_are_inputs(make, pattern):
    config = MaskConfig(keep_ratio=PATTERNS[pattern], pattern=pattern)
    for module in masked_modules(mask_model(make(), config)).values():
        assert module.mask().shape == (module.out_features, module.in_features)
        assert_follows(module.mask(), pattern)


def test_the_inputs_of_a_conv1d_are_divided_into_groups():
    model = mask_model(make_gpt2(n_inner=36), MaskConfig(target_modules=["c_fc"], pattern="4:8"))
    assert {module.scores.shape for module in masked_modules(model).values()} == {(36, 32)}


def test_a_layer_that_groups_do_not_divide_is_named_and_the_model_stays_as_it_is():
    model = make_llama(intermediate_size=60)
    with pytest.raises(
        ValueError, match=r"'model.layers.2.mlp.down_proj' must be row or matrix .* 8, got 4:8 .*\(32, 60\)"
    ):
        mask_model(model, patterned("4:8"))
    assert not masked_modules(model)
    mask_model(model, patterned("2:4"))


def test_experts_peft_and_sharded_say_what_they_take():
    with pytest.raises(ValueError, match="must be matrix for experts in one parameter, got row"):
        masked_mixture(keep_ratio=0.5, pattern="row")
    with pytest.raises(ValueError, match="pattern must be matrix under PEFT .*got 2:4"):
        MaskPeftConfig(pattern="2:4")
    with pytest.raises(ValueError, match="mask.pattern must be matrix with memory: sharded.*got 2:4 in model.layers.2"):
        train("sharded", "2:4")


def train(way, pattern, **settings):
    model = masked_llama(layers=(2, 3), keep_ratio=PATTERNS[pattern], pattern=pattern)
    begun = masks_of(model)
    options = TrainConfig(lr=1e-3, steps=3, batch_size=2, **settings)
    losses = [report.loss for report in train_masks(model, make_rows(), options, way=way)]
    assert any(not torch.equal(begun[name], packed) for name, packed in masks_of(model).items())
    return losses, model


@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_way_gives_the_plain_masks_and_losses(pattern):
    losses, plain = train("plain", pattern)
    for way in ("in_place", "resident", "layerwise"):
        others, model = train(way, pattern)
        assert others == pytest.approx(losses, abs=TOLERANCE[way])
        for name, scores in scores_of(plain).items():
            assert (scores_of(model)[name] - scores).abs().max() <= TOLERANCE[way]
        for name, module in masked_modules(model).items():
            assert_follows(module.mask(), pattern)
            assert torch.equal(module.packed_mask(), masks_of(plain)[name]), (way, name)


def test_plain_training_tells_the_masks_of_the_pattern():
    model = masked_llama(keep_ratio=0.5, pattern="2:4")
    told = PlainStates(model, TrainConfig(steps=1)).packed_masks()
    assert all(torch.equal(one, packed) for one, packed in zip(told, masks_of(model).values(), strict=True))


def test_int16_scores_train_in_a_pattern():
    model = masked_llama(keep_ratio=0.5, pattern="2:4", scores_dtype="int16")
    begun = masks_of(model)
    train_masks(model, make_rows(), TrainConfig(lr=1e-3, steps=2, batch_size=2, moments="8bit"), way="resident")
    for name, module in masked_modules(model).items():
        assert_follows(module.mask(), "2:4")
        assert not torch.equal(begun[name], module.packed_mask())


def test_all_weights_are_kept_for_a_moment_and_a_result_is_put_back():
    model = masked_llama(keep_ratio=0.5, pattern="2:4")
    begun = masks_of(model)
    with keep_all_weights(model):
        assert all(module.mask().all() for module in masked_modules(model).values())
    assert all(torch.equal(begun[name], packed) for name, packed in masks_of(model).items())
    other = masked_llama(keep_ratio=0.5, pattern="2:4", seed=1)
    put_result(other, {f"{name}.mask": packed for name, packed in begun.items()})
    assert all(torch.equal(begun[name], packed) for name, packed in masks_of(other).items())


def test_an_export_tells_its_pattern_and_loads(tmp_path):
    model = masked_llama(keep_ratio=0.5, pattern="2:4")
    expected = masks_of(model)
    save_masks(model, tmp_path / "masks")
    found = read_description(tmp_path / "masks")
    assert (found.pattern, found.keep_ratio) == ("2:4", 0.5)
    for target in (make_llama(), masked_llama(keep_ratio=0.5, pattern="2:4", seed=1)):
        load_masks(target, tmp_path / "masks")
        assert all(torch.equal(expected[name], packed) for name, packed in masks_of(target).items())
    save_masks(masked_llama(), tmp_path / "matrix")
    assert "pattern" not in json.loads((tmp_path / "matrix" / "adapter_config.json").read_text())


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("method", IMPORTANCE_METHODS)
def test_scores_and_one_shot_masks_keep_the_most_important_of_each_group(method, pattern):
    model, rows = make_llama(), padded_rows()
    names = [name for name in masked_modules(mask_model(make_llama(), patterned(pattern)))]
    found = importance(model, names, method, rows, seed=0)
    one_shot = masked_modules(one_shot_mask(model, patterned(pattern), method, rows))
    begun = mask_model(make_llama(), patterned(pattern, init="constant"))
    begun = masked_modules(initialise_scores(begun, method, rows))
    for name, values in found.items():
        size = values.shape[1] if pattern == "row" else int(pattern[2])
        for mask in (one_shot[name].mask(), begun[name].mask()):
            assert_follows(mask, pattern)
            kept, groups = mask.view(-1, size), values.view(-1, size)
            least = torch.where(kept, groups, torch.inf).amin(1)
            assert (least >= torch.where(kept, -torch.inf, groups).amax(1)).all()


def test_scores_from_data_keep_the_pattern():
    model = mask_from_data(make_llama(), patterned("2:4", init="wanda", calibration_rows=6), padded_rows())
    found = importance(make_llama(), list(masked_modules(model)), "wanda", padded_rows())
    for name, module in masked_modules(model).items():
        least = found[name].view(-1, 4).sort(1, descending=True).values[:, 1:2]
        assert torch.equal(module.mask().view(-1, 4), found[name].view(-1, 4) >= least)


ARMS = """
  full: {kind: full, lrs: [1e-3]}
  mft: {kind: mask, lrs: [1e-3]}
  half: {kind: mask, lrs: [1e-3], pattern: "2:4"}
  rows: {kind: wanda, pattern: row, keep_ratios: [0.7]}
  whole: {kind: magnitude, pattern: matrix}
  wanda: {kind: wanda}
"""


def test_arms_have_a_pattern_that_enters_their_own_values_alone(tmp_path):
    study = make_study(tmp_path, ARMS)
    values = study_values(study)
    assert {name for name, arm in values["arms"].items() if "pattern" in arm} == {"half", "rows", "whole"}
    assert "pattern" not in values["mask"]
    found = {name: arm.mask_config(study.mask) for name, arm in study.arms.items()}
    assert (found["half"].pattern, found["half"].keep_ratio) == ("2:4", 0.5)
    assert (found["rows"].pattern, found["rows"].keep_ratio) == ("row", 0.7)
    assert found["mft"] == found["wanda"] == study.mask
    assert [setting.keep_ratio for setting in study.arms["half"].settings(study.mask)] == [0.5]
    assert [setting.keep_ratio for setting in study.arms["rows"].settings(study.mask)] == [0.7]


def test_a_study_without_a_keep_ratio_takes_that_of_its_pattern(tmp_path):
    path = tmp_path / "study.yaml"
    path.write_text(STUDY.format(directory=tmp_path).replace(", keep_ratio: 0.9", "") + ARMS)
    assert load_study(path, ["mask.pattern=matrix"]).mask == load_study(path).mask
    assert load_study(path, ["mask.pattern='2:4'"]).mask.keep_ratio == 0.5


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"pattern": "2:4", "keep_ratios": [0.9]}, r"keep_ratios must be \[0.5\] or left out with pattern 2:4"),
        ({"pattern": "row", "threshold": 0.1}, "pattern must be left out with a threshold, got row"),
        ({"pattern": "row", "budget": 0.1}, "pattern must be left out when budget is set, got row"),
    ],
)
def test_an_arms_pattern_needs_a_keep_ratio(keys, message):
    with pytest.raises(ValueError, match=message):
        make_arm("mask", lrs=[1e-3], **keys)
