"""Arms of any PEFT method: the grid of options, what they train and store, and what happens if one fails."""

import json
import re
from dataclasses import replace

import pytest
import torch
from tiny import logits, make_llama, make_rows
from tiny_study import FEW, FULL, make_study, run_quietly

from mft.config import MaskConfig, TrainConfig
from mft_study.arms.arm import Ground
from mft_study.arms.kinds import make_arm
from mft_study.load import load_study, study_values
from mft_study.report.write import write_study_report
from mft_study.study_plan import units_declared

MASK = MaskConfig.paper(layers_to_transform=[2, 3])
SHIRA = {"peft_type": "SHIRA", "r": 2}


def arm_of(lrs=(1e-2,), **config):
    return make_arm("peft", lrs=list(lrs), config=config)


def ground_of(arm, dtype=torch.float32, setting=None, **options):
    model = make_llama(dtype)
    setting = setting or arm.settings(MASK)[0]
    layers = arm.targets(model, MASK, setting)
    ground = Ground(model, model, layers, MASK, setting, 7, lambda: make_rows(16))
    return replace(ground, **options)


def trained(arm, ground, steps=5):
    model = arm.untrained(ground)
    arm.train(model, ground, make_rows(16), TrainConfig(lr=1e-2, steps=steps, batch_size=4))
    return model, arm.trained_weights(model, ground)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "config",
    [
        SHIRA,
        {"peft_type": "LORA", "r": 4, "lora_alpha": 1, "use_rslora": True},
        {"peft_type": "LORA", "r": 4, "use_dora": True, "layers_to_transform": "all", "target_modules": ["q_proj"]},
        {"peft_type": "LORA", "r": 4, "init_lora_weights": "pissa"},
        {"peft_type": "VERA", "r": 8},
        {"peft_type": "IA3", "feedforward_modules": ["down_proj"], "target_modules": ["k_proj", "down_proj"]},
        {"peft_type": "LN_TUNING"},
        {"peft_type": "OFT", "oft_block_size": 8},
        {"peft_type": "FOURIERFT", "n_frequency": 50},
    ],
    ids=lambda config: "-".join(str(value) for value in config.values()),
)
def test_a_method_trains_is_loaded_again_and_merges_into_weights_of_its_start(config, dtype):
    arm = arm_of(**config)
    ground = ground_of(arm, dtype)
    before = logits(ground.start)
    model, weights = trained(arm, ground)
    out = logits(model)
    assert not torch.equal(out, before)
    assert torch.equal(logits(ground.start), before)  # other arms begin at it too
    assert torch.equal(logits(arm.model_with(ground, weights)), out)
    numbers = sum(weight.numel() for weight in weights.values())
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    assert arm.stored_bytes(ground, model) == 2 * numbers
    assert arm.training_bytes(ground, TrainConfig(steps=1)) == 16 * numbers
    merged = arm.merged(ground, weights)
    plain = make_llama(dtype)
    for name, weight in merged.items():
        assert weight.dtype == dtype
        plain.get_parameter(name).data = weight
    rounding = 1e-5 if dtype == torch.float32 else 0.02 + 0.2 * (out - before).abs().max().float()
    assert (logits(plain).float() - out.float()).abs().max() <= rounding


def test_options_with_lists_are_a_grid_and_those_that_take_lists_are_not():
    arm = arm_of((1e-3, 1e-2), peft_type="LORA", r=[4, 16], target_modules=["q_proj", "v_proj"], lora_alpha=8)
    assert len(arm.settings(MASK)) == 4
    assert [arm.options(setting)["r"] for setting in arm.settings(MASK)] == [4, 16, 4, 16]
    assert {tuple(arm.options(setting)["target_modules"]) for setting in arm.settings(MASK)} == {("q_proj", "v_proj")}
    assert str(arm.settings(MASK)[1]) == "lr 0.001, epochs 1, lora_alpha 8, r 16, target_modules q_proj+v_proj"
    layers = arm_of(peft_type="SHIRA", r=1, layers_to_transform=["1-2", "all"], target_modules=[["q_proj"], ["k_proj"]])
    found = [layers.targets(make_llama(), MASK, setting) for setting in layers.settings(MASK)]
    assert [len(names) for names in found] == [2, 2, 4, 4]
    assert found[1] == [f"model.layers.{i}.self_attn.k_proj" for i in (1, 2)]
    assert [layers.frozen_below(make_llama(), MASK, setting) for setting in layers.settings(MASK)] == [1, 1, 0, 0]


def test_layers_are_those_of_the_mask_unless_they_are_given():
    arm = arm_of(**SHIRA)
    (setting,) = arm.settings(MASK)
    assert len(arm.targets(make_llama(), MASK, setting)) == 14
    assert arm.targets(make_llama(), replace(MASK, layers_to_transform=0), setting)[0].startswith("model.layers.0.")


def test_lora_is_this_arm_with_its_options():
    lora, peft = (
        make_arm("lora", lrs=[1e-2], lora_rank=2),
        arm_of(peft_type="LORA", r=2, lora_alpha=4, lora_dropout=0.0),
    )
    found = []
    for arm in (lora, peft):
        ground = ground_of(arm)
        model, weights = trained(arm, ground)
        found.append((logits(model), weights, arm.stored_bytes(ground, model)))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1].keys() == found[1][1].keys()
    assert found[0][2] == found[1][2]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "config.peft_type must be a method of PEFT"),
        ({"peft_type": "SHIRRA"}, "config.peft_type must be a method of PEFT .*; did you mean SHIRA?"),
        ({"peft_type": "PREFIX_TUNING"}, "config.peft_type must be a method .*, got PREFIX_TUNING: it trains a prompt"),
        (SHIRA | {"randomseed": 1}, "config must hold options of SHIRA, got 'randomseed'; did you mean random_seed?"),
        (SHIRA | {"task_type": "CAUSAL_LM"}, "config must hold options of SHIRA, got 'task_type'"),
        (SHIRA | {"r": "four"}, "config.r must be int, or a list of such values to choose from, got 'four'"),
        (SHIRA | {"r": []}, re.escape("config.r must be int, or a list of such values to choose from, got []")),
        (SHIRA | {"layers_to_transform": "3-1"}, "layers_to_transform"),
        ({"peft_type": "LN_TUNING", "layers_to_transform": 1}, "config.layers_to_transform must be left out for LN_TU"),
    ],
)
def test_options_that_the_method_does_not_have_are_told(config, message):
    with pytest.raises(ValueError, match=message):
        arm_of(**config)


def test_a_file_says_where_it_is_wrong_and_an_override_reaches_an_option(tmp_path):
    arms = FULL + "  sparse: {kind: peft, lrs: [1e-2], config: {peft_type: SHIRA, r: 4}}\n"
    study = make_study(tmp_path, arms, ["arms.sparse.config.r=[2,4]"])
    assert study.arms["sparse"].config["r"] == [2, 4]
    assert units_declared(study) == {"full": 3, "sparse": 3}
    path = tmp_path / "again.yaml"
    path.write_text(json.dumps(study_values(study)))
    assert load_study(path) == study
    with pytest.raises(ValueError, match="arms.sparse.config must hold options of SHIRA, got 'alpha'"):
        make_study(tmp_path, arms, ["arms.sparse.config.alpha=4"])


ARMS = (
    FEW
    + """
  sparse: {kind: peft, lrs: [1e-2], config: {peft_type: SHIRA, r: [1, 2], layers_to_transform: [2-3, "1"]}}
  norms: {kind: peft, lrs: [1e-2], config: {peft_type: LN_TUNING}}
  part of sparse: {kind: interpolated, of: sparse, alphas: [0.5, 1]}
  too large: {kind: peft, lrs: [1e-2], config: {peft_type: SHIRA, r: 32}}
  mean of too large: {kind: average, of: too large, runs: 2}
  biases: {kind: peft, lrs: [1e-2], config: {peft_type: BEFT}}
  mean of biases: {kind: average, of: biases, runs: 2}
  nan: {kind: peft, lrs: [1e30], config: {peft_type: LORA, r: 1}}
"""
)


@pytest.mark.slow
def test_a_study_goes_on_past_what_fails_and_reports_it_as_a_row_with_its_reason(ground, tmp_path):
    study = make_study(ground, ARMS, ["seeds=[0]"])
    found, _ = run_quietly(study, tmp_path / "run")
    write_study_report(found, tmp_path / "run", {})
    without = found.without_result["count"]
    assert list(without) == ["too large", "mean of too large", "mean of biases", "nan"]
    assert "SHIRA cannot be used here: ValueError: The set rank 32 results in more shira params" in without["too large"]
    assert without["mean of too large"].endswith("must have what it needs, too large, which has no result")
    assert "BEFT cannot be merged: ValueError: Base layer has no bias" in without["mean of biases"]
    assert "must stay finite" in without["nan"]
    assert {"sparse", "norms", "part of sparse", "biases"} <= set(found.test["count"])
    table = (tmp_path / "run" / "table.md").read_text()
    assert re.search(r"\| too large \| no result: count, too large: SHIRA cannot be used here.*\| - \|", table)
    rows = json.loads((tmp_path / "run" / "table.json").read_text())["domains"]["count"]
    assert rows["without_result"] == without
    assert units_declared(study)["sparse"] == 4  # 2 ranks times 2 places
    again, _ = run_quietly(study, tmp_path / "run")
    assert again.without_result == found.without_result
    assert len(again.outcomes) == len(found.outcomes)
