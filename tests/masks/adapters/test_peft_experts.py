"""Masks on a mixture's experts under PEFT: the same as mask_model gives, and what PEFT expects of every method."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from peft_masks import STILL_CALLED, assert_same, two_masks
from tiny_architectures import state
from tiny_mixtures import logits, mixture

from mft import (
    MaskConfig,
    mask_model,
    merged_weights,
    unmasked_model,
)
from mft.masks.peft import MaskPeftConfig
from mft.masks.peft_layers.layer import MaskExperts

pytestmark = STILL_CALLED
SETTING = {"keep_ratio": 0.6, "init": "normal"}
EXPERTS = "model.layers.1.mlp.experts"


@pytest.fixture(scope="module")
def olmoe():
    return mixture("Olmoe")


def adapted(base, **setting):
    return get_peft_model(copy.deepcopy(base), MaskPeftConfig(**setting or SETTING, task_type="CAUSAL_LM")).eval()


# ---------------------------------------------------------------------------------------------- what is masked


@pytest.mark.parametrize("names", [["experts.gate_up_proj"], ["down_proj", "q_proj.weight"], [f"{EXPERTS}.down_proj"]])
def test_target_parameters_name_the_parameters_that_they_name_to_lora(olmoe, names):
    lora = get_peft_model(copy.deepcopy(olmoe), LoraConfig(target_parameters=names, target_modules=[]))
    model = adapted(olmoe, target_parameters=names, **SETTING)
    expected = {name.removesuffix(".weight") for name in lora.base_model.targeted_parameter_names}
    found = {
        name for m in model.modules() if hasattr(m, "mft_scores") for name in map(m.names.get, m.scores_of("default"))
    }
    assert found == expected
    assert torch.equal(
        logits(model), logits(mask_model(copy.deepcopy(olmoe), MaskConfig(target_parameters=names, **SETTING)))
    )


def test_scores_alone_are_trained_and_named_after_the_module_that_holds_the_experts(olmoe):
    model = adapted(olmoe, target_parameters=["layers.1.mlp.experts.gate_up_proj"])
    (name,) = (name for name, p in model.named_parameters() if p.requires_grad)
    assert name == f"base_model.model.{EXPERTS}.mft_scores.default.gate_up_proj"
    assert model.get_nb_trainable_parameters()[0] == 5 * 96 * 32


def test_modules_to_save_keep_their_experts_whole(olmoe):
    model = adapted(olmoe, modules_to_save=["layers.1.mlp"], **SETTING)
    assert [m.module_name for m in model.modules() if isinstance(m, MaskExperts)] == ["model.layers.0.mlp.experts"]


def test_masks_are_injected_by_what_was_saved(olmoe):
    stored = {f"{EXPERTS}.mft_scores.{part}": None for part in ("gate_up_proj", "down_proj")}
    config = MaskPeftConfig(**SETTING, target_parameters=["layers.1.mlp.experts.down_proj"])
    model = inject_adapter_in_model(config, copy.deepcopy(olmoe), state_dict=stored)
    assert [m.module_name for m in model.modules() if isinstance(m, MaskExperts)] == [EXPERTS]


# ---------------------------------------------------------------------------------------------- refused


def test_scores_that_are_not_finite_are_named_and_leave_every_weight_as_it_was(olmoe):
    model = adapted(olmoe)
    with torch.no_grad():
        model.get_submodule(f"base_model.model.{EXPERTS}").mft_scores["default"]["down_proj"][3, 0, 0] = float("nan")
    before = state(model)
    message = rf"scores of module '{EXPERTS}.down_proj' must be finite"
    for run in (lambda: logits(model), model.merge_adapter, model.merge_and_unload, lambda: merged_weights(model)):
        with pytest.raises(ValueError, match=message):
            run()
    assert_same(state(model), before)


def test_the_base_beside_a_peft_model_is_its_own_with_masks_off(olmoe):
    with pytest.raises(ValueError, match=r"a PeftModel has disable_adapter\(\)"):
        unmasked_model(adapted(olmoe))


def test_masks_of_experts_are_combined(olmoe):
    model = two_masks("experts")
    model.add_weighted_adapter(["default", "other"], None, "both", "intersection")
    model.set_adapter("both")
    merged = model.merge_and_unload().get_submodule(EXPERTS)
    one, other = two_masks("experts"), two_masks("experts")
    other.set_adapter("other")
    expected = one.merge_and_unload().get_submodule(EXPERTS)
    expected.down_proj.data[other.merge_and_unload().get_submodule(EXPERTS).down_proj == 0] = 0
    assert torch.equal(merged.down_proj, expected.down_proj)
    assert torch.equal(merged.gate_up_proj, expected.gate_up_proj)
