"""Masks on a mixture's experts under PEFT: the same as mask_model gives, and what PEFT expects of every method."""

import contextlib
import copy
import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_base_model_state_dict, get_peft_model, inject_adapter_in_model
from peft_masks import STILL_CALLED, assert_same
from safetensors.torch import load_file
from tiny_architectures import state
from tiny_mixtures import IDS, mixture

from mft import (
    MaskConfig,
    load_masks,
    mask_model,
    masked_modules,
    merge_model,
    merged_weights,
    save_masks,
    unmasked_model,
)
from mft.masks.peft import MaskPeftConfig, to_masked_model
from mft.masks.peft_layers.layer import MaskExperts
from mft.publishing.kinds import read_contents

pytestmark = STILL_CALLED
SETTING = {"keep_ratio": 0.6, "init": "normal"}
OTHER = {"keep_ratio": 0.5, "init": "normal", "seed": 1, "target_parameters": ["experts.down_proj"]}
EXPERTS = "model.layers.1.mlp.experts"


@pytest.fixture(scope="module", params=["Olmoe", "GptOss", "Llama4Text", "JetMoe"])
def each(request):
    return mixture(request.param)


@pytest.fixture(scope="module")
def olmoe():
    return mixture("Olmoe")


def ours(base, **setting):
    return mask_model(copy.deepcopy(base), MaskConfig(**setting or SETTING))


def adapted(base, **setting):
    return get_peft_model(copy.deepcopy(base), MaskPeftConfig(**setting or SETTING, task_type="CAUSAL_LM")).eval()


def two_masks(base):
    model = adapted(base)
    model.add_adapter("other", MaskPeftConfig(**OTHER))
    return model


@torch.no_grad()
def logits(model, ids=IDS, **options):
    return model(input_ids=ids, use_cache=False, **options).logits


def learned(model):
    """Return scores and their gradients of the default mask, or of our masked layers, by layer."""
    model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    if hasattr(model, "peft_config"):
        layers = [m for m in model.modules() if hasattr(m, "mft_scores")]
        scores = {layer.names[p]: s for layer in layers for p, s in layer.scores_of("default").items()}
    else:
        scores = {name: layer.scores for name, layer in masked_modules(model).items()}
    return {name: s.detach() for name, s in scores.items()}, {name: s.grad for name, s in scores.items()}


# ---------------------------------------------------------------------------------------------- equal to our own API


def test_scores_logits_and_gradients_are_those_of_mask_model_bit_for_bit(each):
    masked, model = ours(each), adapted(each)
    assert any(isinstance(module, MaskExperts) for module in model.modules())
    assert torch.equal(logits(model), logits(masked))
    for found, expected in zip(learned(model), learned(masked)):
        assert_same(found, expected)


def test_merging_gives_the_model_of_merge_model_bit_for_bit_and_unmerging_the_base(each):
    model, expected = adapted(each), merge_model(ours(each))
    one_by_one = dict(merged_weights(model))
    assert list(one_by_one) == list(dict(merged_weights(ours(each))))
    for name, tensor in one_by_one.items():
        assert torch.equal(tensor, expected.state_dict()[name]), name
    masked = logits(model)
    model.merge_adapter()
    assert (logits(model) - masked).abs().max() <= 1e-5 * masked.abs().max()
    assert_same(get_base_model_state_dict(model), state(expected))
    model.unmerge_adapter()
    assert_same(get_base_model_state_dict(model), state(each))
    merged = model.merge_and_unload()
    assert [type(module) for module in merged.modules()] == [type(module) for module in each.modules()]
    assert_same(state(merged), state(expected))


def test_what_either_api_saves_the_other_loads(each, tmp_path):
    directory = save_masks(ours(each), tmp_path / "masks")
    model = PeftModel.from_pretrained(copy.deepcopy(each), directory)
    loaded = load_masks(copy.deepcopy(each), directory)
    assert torch.equal(logits(model), logits(loaded))
    masked = to_masked_model(adapted(each))
    assert_same(state(masked), state(ours(each)))
    assert list(masked_modules(masked)) == list(masked_modules(ours(each)))
    save_masks(masked, tmp_path / "again")
    again = load_masks(copy.deepcopy(each), tmp_path / "again")
    assert torch.equal(logits(again), logits(loaded))


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
    assert torch.equal(logits(model), logits(ours(olmoe, target_parameters=names, **SETTING)))


def test_scores_alone_are_trained_and_named_after_the_module_that_holds_the_experts(olmoe):
    model = adapted(olmoe, target_parameters=["layers.1.mlp.experts.gate_up_proj"])
    (name,) = (name for name, p in model.named_parameters() if p.requires_grad)
    assert name == f"base_model.model.{EXPERTS}.mft_scores.default.gate_up_proj"
    assert model.get_nb_trainable_parameters()[0] == 5 * 96 * 32


def test_modules_to_save_keep_their_experts_whole(olmoe):
    model = adapted(olmoe, modules_to_save=["layers.1.mlp"], **SETTING)
    assert [m.module_name for m in model.modules() if isinstance(m, MaskExperts)] == ["model.layers.0.mlp.experts"]


# ---------------------------------------------------------------------------------------------- several masks


def test_masks_are_switched_and_deleted_on_weights_that_are_shared(olmoe):
    base = copy.deepcopy(olmoe)
    address = base.get_submodule(EXPERTS).gate_up_proj.data_ptr()
    model = get_peft_model(base, MaskPeftConfig(**SETTING)).eval()
    first = logits(model)
    model.add_adapter("other", MaskPeftConfig(**OTHER))
    assert torch.equal(logits(model), first)
    model.set_adapter("other")
    assert {n.split(".")[-2:][0] for n, p in model.named_parameters() if p.requires_grad} == {"other"}
    assert torch.equal(logits(model), logits(ours(olmoe, **OTHER)))
    assert_same(dict(merged_weights(model)), state(merge_model(ours(olmoe, **OTHER))))
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(olmoe))
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    assert model.get_submodule(f"base_model.model.{EXPERTS}").base_layer.gate_up_proj.data_ptr() == address
    model.delete_adapter("other")
    assert not any("other" in name for name, _ in model.named_parameters())
    assert torch.equal(logits(model), first)
    assert_same(state(model.unload()), state(olmoe))


def test_each_row_of_a_batch_takes_the_mask_that_it_names(olmoe):
    model, names, ids = two_masks(olmoe), ["other", "__base__", "default", "other"], torch.cat([IDS, IDS.flip(1)])
    found = logits(model, ids, adapter_names=names)
    alone = []
    for row, name in enumerate(names):
        if name != "__base__":
            model.set_adapter(name)
        with model.disable_adapter() if name == "__base__" else contextlib.nullcontext():
            alone.append(logits(model, ids[row : row + 1]))
    torch.testing.assert_close(found, torch.cat(alone), rtol=1e-5, atol=1e-6)
    assert (found - logits(model, ids)).abs().amax((1, 2)).gt(1e-3).tolist() == [False, True, True, False]
    with pytest.raises(
        ValueError, match=r"adapter_names must have one entry per row .*, got 3 of them and an input of \(4, 12"
    ):
        logits(model, ids, adapter_names=names[:3])
    hooked = [name for name, module in model.named_modules() if module._forward_pre_hooks]
    assert hooked == ["base_model.model.lm_head"]  # the hook of models/head_input.py
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"no mask merged into them, got 'other' in .*: unmerge_adapter\(\) first"):
        logits(model, ids, adapter_names=names)


# ---------------------------------------------------------------------------------------------- files


def test_what_is_saved_is_loaded_bit_for_bit_and_described(olmoe, tmp_path):
    model = two_masks(olmoe)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert stored[f"base_model.model.{EXPERTS}.mft_scores.down_proj"].shape == (5, 32, 48)
    assert json.loads((tmp_path / "other" / "adapter_config.json").read_text())["target_parameters"] == [
        "experts.down_proj"
    ]
    for options in ({}, {"low_cpu_mem_usage": True}):
        loaded = PeftModel.from_pretrained(copy.deepcopy(olmoe), tmp_path, **options)
        assert loaded.load_adapter(tmp_path / "other", "other").missing_keys == []
        assert_same(state(loaded), state(model))
    assert read_contents(tmp_path).facts.modules == len(stored) == 2 * (4 + 2)


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
    model = two_masks(olmoe)
    model.add_weighted_adapter(["default", "other"], None, "both", "intersection")
    model.set_adapter("both")
    merged = model.merge_and_unload().get_submodule(EXPERTS)
    one, other = two_masks(olmoe), two_masks(olmoe)
    other.set_adapter("other")
    expected = one.merge_and_unload().get_submodule(EXPERTS)
    expected.down_proj.data[other.merge_and_unload().get_submodule(EXPERTS).down_proj == 0] = 0
    assert torch.equal(merged.down_proj, expected.down_proj)
    assert torch.equal(merged.gate_up_proj, expected.gate_up_proj)
