"""Masks under PEFT: bitwise equal to our own API, and what PEFT expects of every method.

All after the first part follows the tests that PEFT runs on its own methods (huggingface/peft,
tests/testing_common.py, Apache 2.0), by subject and in our words. test_peft_suite.py runs the originals, if a checkout
of PEFT is given.
"""

import copy
import importlib
import json
import subprocess
import sys
from functools import partial

import peft
import pytest
import torch
from peft import PeftModel, get_base_model_state_dict, get_peft_model, inject_adapter_in_model
from peft_masks import SETTING, STILL_CALLED, TWO, UP, assert_same, config, layers, scores, two_masks, with_masks
from safetensors.torch import load_file
from tiny import TOKENS, logits, make_gpt2, make_llama
from tiny_architectures import state
from tiny_mixtures import mixture
from transformers import LlamaForSequenceClassification

from mft import MaskConfig, load_masks, mask_model, masked_modules, merge_model, merged_weights, save_masks
from mft.masks.peft import MaskPeftConfig, to_masked_model
from mft.publishing.content_kinds import read_contents

pytestmark = STILL_CALLED


def gradients(model):
    model.zero_grad()
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    return {
        name.replace("base_model.model.", "").replace("mft_scores.default", "scores"): p.grad.clone()
        for name, p in model.named_parameters()
        if p.grad is not None
    }


# ---------------------------------------------------------------------------------------------- equal to our own API

BASES = {
    "llama": make_llama,
    "llama in bf16": lambda: make_llama(torch.bfloat16),
    "gpt2": partial(make_gpt2, n_layer=4),  # Conv1D
    **{kind: partial(mixture, kind) for kind in ("Olmoe", "GptOss", "Llama4Text", "JetMoe")},
}


@pytest.fixture(scope="module", params=BASES)
def base(request):
    return BASES[request.param]()


def ours(base):
    return mask_model(copy.deepcopy(base), MaskConfig(**SETTING | {"layers_to_transform": None}))


def adapted(base):
    return with_masks(copy.deepcopy(base), layers_to_transform=None)


def learned(model):
    """Return scores and their gradients of the default mask, or of our masked layers, by layer."""
    model(input_ids=TOKENS, labels=TOKENS, use_cache=False).loss.backward()
    if hasattr(model, "peft_config"):
        found = [m for m in model.modules() if hasattr(m, "mft_scores")]
        scores = {layer.names[p]: s for layer in found for p, s in layer.scores_of("default").items()}
    else:
        scores = {name: layer.scores for name, layer in masked_modules(model).items()}
    return {name: s.detach() for name, s in scores.items()}, {name: s.grad for name, s in scores.items()}


def test_scores_logits_and_gradients_are_those_of_mask_model_bit_for_bit(base):
    masked, model = ours(base), adapted(base)
    assert torch.equal(logits(model), logits(masked))
    assert not torch.equal(logits(model), logits(base))
    for found, expected in zip(learned(model), learned(masked)):
        assert_same(found, expected)


def test_merging_gives_the_model_of_merge_model_bit_for_bit_and_unmerging_the_base(base):
    model, expected = adapted(base), merge_model(ours(base))
    one_by_one = dict(merged_weights(model))
    assert list(one_by_one) == list(dict(merged_weights(ours(base))))
    for name, tensor in one_by_one.items():
        assert torch.equal(tensor, expected.state_dict()[name]), name
    masked, near = logits(model), 1e-5 if base.dtype == torch.float32 else 2e-2
    model.merge_adapter()
    assert (logits(model) - masked).abs().max() <= near * masked.abs().max()
    assert_same(get_base_model_state_dict(model), state(expected))
    model.unmerge_adapter()
    assert_same(get_base_model_state_dict(model), state(base))
    merged = model.merge_and_unload()
    assert [type(module) for module in merged.modules()] == [type(module) for module in base.modules()]
    assert_same(state(merged), state(expected))
    assert not hasattr(merged, "peft_config")


def test_what_either_api_saves_the_other_loads(base, tmp_path):
    directory = save_masks(ours(base), tmp_path / "masks")
    model = PeftModel.from_pretrained(copy.deepcopy(base), directory)
    loaded = load_masks(copy.deepcopy(base), directory)
    assert torch.equal(logits(model), logits(loaded))
    masked = to_masked_model(adapted(base))
    assert_same(state(masked), state(ours(base)))
    assert list(masked_modules(masked)) == list(masked_modules(ours(base)))
    again = load_masks(copy.deepcopy(base), save_masks(masked, tmp_path / "again"))
    assert torch.equal(logits(again), logits(loaded))


def test_training_takes_the_steps_of_mask_model():
    ours, model = mask_model(make_llama(), MaskConfig(**SETTING)), with_masks()
    for trained in (ours, model):
        optimizer = torch.optim.AdamW([p for p in trained.parameters() if p.requires_grad], lr=5e-3)
        for _ in range(4):
            trained(input_ids=TOKENS, labels=TOKENS).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert_same(scores(model), scores(ours))
    assert not torch.equal(logits(model), logits(with_masks()))


def test_autocast_computes_what_mask_model_does():
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(logits(with_masks()), logits(mask_model(make_llama(), MaskConfig(**SETTING))))


def test_every_field_of_mask_config_is_taken():
    where = {"target_modules": "all-linear", "exclude_modules": ["mlp"], "layers_to_transform": "0,3"}
    ours = MaskConfig(**where, mode="value", threshold=0.01, init="magnitude", scores_dtype="bfloat16", seed=5)
    model = get_peft_model(make_llama(), MaskPeftConfig(**vars(ours)))
    masked = mask_model(make_llama(), ours)
    assert_same(scores(model), scores(masked))
    assert torch.equal(logits(model), logits(masked))


# ---------------------------------------------------------------------------------------------- model and training


@pytest.mark.parametrize("name", ["default", "another-name"])
def test_only_the_scores_of_the_chosen_layers_are_trained(name):
    model = get_peft_model(make_llama(), config(target_modules=["up_proj", "q_proj"]), adapter_name=name)
    modules = [f"model.layers.{i}.{part}" for i in (2, 3) for part in ("self_attn.q_proj", "mlp.up_proj")]
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"base_model.model.{module}.mft_scores.{name}" for module in modules}
    assert model.get_nb_trainable_parameters()[0] == 2 * (32 * 32 + 64 * 32)
    assert type(model) is peft.PeftModelForCausalLM
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == trained


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_no_gradient(use_reentrant):
    model = with_masks().train()
    plain = gradients(model)
    model.prepare_model_for_gradient_checkpointing(model)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    assert_same(gradients(model), plain)


@pytest.mark.parametrize("scores_dtype", ["float32", "bfloat16"])
def test_casting_the_model_leaves_the_scores_alone(scores_dtype):
    model = with_masks(scores_dtype=scores_dtype).to(torch.float16)
    assert {layer.mft_scores["default"].dtype for layer in layers(model)} == {getattr(torch, scores_dtype)}
    assert {layer.weight.dtype for layer in layers(model)} == {torch.float16}


# ---------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("kind", TWO)
def test_what_is_saved_is_loaded_bit_for_bit_and_trains_on(tmp_path, kind):
    model, make = two_masks(kind), TWO[kind][0]
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        *("README.md", "adapter_config.json", "adapter_model.safetensors", "other"),
    }
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert all(".mft_scores" in key for key in stored)
    assert read_contents(tmp_path).facts.modules == len(stored)
    for options in ({}, {"low_cpu_mem_usage": True}):
        loaded = PeftModel.from_pretrained(make(), tmp_path, is_trainable=True, **options)
        assert loaded.load_adapter(tmp_path / "other", "other").missing_keys == []
        assert_same(state(loaded), state(model))
    assert_same(gradients(loaded), gradients(model))
    frozen = PeftModel.from_pretrained(make(), tmp_path)
    assert not any(p.requires_grad for p in frozen.parameters())


@pytest.mark.parametrize("targets", [None, "all-linear", ["q_proj", "up_proj"], r".*\.(q|up)_proj"])
def test_the_configuration_is_saved_as_it_was_written(tmp_path, targets):
    written = config(target_modules=targets, exclude_modules=["k_proj"])
    model = get_peft_model(make_llama(), written).eval()
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (stored["peft_type"], stored["target_modules"], stored["exclude_modules"]) == ("MFT", targets, ["k_proj"])
    assert stored["keep_ratio"] == 0.7
    assert torch.equal(logits(PeftModel.from_pretrained(make_llama(), tmp_path)), logits(model))


@pytest.mark.parametrize(
    ("saved", "meant"),
    [
        ({"budget": 0.07}, {"budget": 0.07, "fill_budget": True, "keep_ratio": None}),
        ({"threshold": 0.5}, {"threshold": 0.5, "keep_ratio": None}),
        ({}, {"keep_ratio": 0.99}),
    ],
    ids=str,
)
def test_a_config_of_an_older_version_means_what_it_meant(saved, meant, tmp_path):
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({"peft_type": "MFT", **saved}))
    values = MaskPeftConfig.from_json_file(str(path))
    assert {name: values[name] for name in meant} == meant


def test_a_selected_adapter_is_saved_alone_whatever_the_others_are_called(tmp_path):
    model = with_masks()
    for name in ("default2", "other_default", "efaul"):
        model.add_adapter(name, config())
    model.save_pretrained(tmp_path, selected_adapters=["default"])
    assert len(load_file(tmp_path / "adapter_model.safetensors")) == len(layers(model))


def test_low_cpu_mem_usage_loads_the_same_scores(tmp_path):
    model = with_masks(make_llama(torch.bfloat16))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_llama(torch.bfloat16), tmp_path, low_cpu_mem_usage=True)
    assert_same(state(loaded), state(model))
    loaded.load_adapter(tmp_path, "again", low_cpu_mem_usage=True)
    assert not any(p.is_meta for p in loaded.parameters())
    injected = inject_adapter_in_model(config(), make_llama(), low_cpu_mem_usage=True)
    assert {layer.mft_scores["default"].is_meta for layer in layers(injected)} == {True}


def test_modules_to_save_are_trained_and_saved_beside_the_masks(tmp_path):
    model = with_masks(modules_to_save=["model.norm"])
    with torch.no_grad():
        model.get_base_model().model.norm.modules_to_save["default"].weight.add_(1)
    assert "model.norm.modules_to_save.default.weight" in gradients(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(make_llama(), tmp_path)), logits(model))
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(make_llama()))
    with pytest.raises(ValueError, match="modules_to_save must be null"):
        to_masked_model(model)


def test_peft_may_name_heads_that_a_classifier_lacks():
    """For this task PEFT itself adds "classifier" and "score" to the modules to save; a model has one of the two."""
    classifier = LlamaForSequenceClassification(make_llama().config)
    model = get_peft_model(classifier, MaskPeftConfig(task_type="SEQ_CLS"))
    assert any(p.requires_grad for p in model.get_base_model().score.parameters())


def test_a_module_to_save_gets_no_mask():
    model = with_masks(modules_to_save=["layers.3.mlp.up_proj"], target_modules=["up_proj"])
    assert [layer.module_name for layer in layers(model)] == [UP]


# ---------------------------------------------------------------------------------------------- our export


def test_the_active_mask_becomes_a_masked_model_and_an_export(tmp_path):
    model = two_masks()
    model.set_adapter("other")
    model.merge_adapter()
    expected = mask_model(make_llama(), MaskConfig.paper(layers_to_transform=[1, 2], keep_ratio=0.5, seed=1))
    masked = to_masked_model(model)
    assert_same(state(masked), state(expected))
    save_masks(masked, tmp_path / "masks")
    loaded = load_masks(make_llama(), tmp_path / "masks")
    bits = [{n: m.packed_mask() for n, m in masked_modules(each).items()} for each in (loaded, expected)]
    assert_same(*bits)


@pytest.mark.parametrize("make", [make_llama, BASES["gpt2"]])
@pytest.mark.parametrize(("mode", "coding"), [("magnitude", "packed"), ("value", "rice"), ("value", "by_weight")])
def test_an_export_of_masks_is_loaded_by_peft(tmp_path, make, mode, coding):
    save_masks(mask_model(make(), MaskConfig(**SETTING, mode=mode)), tmp_path / "masks", coding=coding)
    model = PeftModel.from_pretrained(make(), tmp_path / "masks")
    assert torch.equal(logits(model), logits(load_masks(make(), tmp_path / "masks")))
    model.save_pretrained(tmp_path / "scores")
    assert torch.equal(logits(PeftModel.from_pretrained(make(), tmp_path / "scores")), logits(model))
    model.load_adapter(tmp_path / "masks", "again")
    model.set_adapter("again")
    assert torch.equal(logits(model), logits(load_masks(make(), tmp_path / "masks")))


def test_an_export_of_another_base_is_refused(tmp_path):
    save_masks(mask_model(make_llama(), MaskConfig(**SETTING)), tmp_path / "masks")
    with pytest.raises(ValueError, match=r"learned on other weights .* those were float32: load it in that dtype"):
        PeftModel.from_pretrained(make_llama(torch.bfloat16), tmp_path / "masks")
    with pytest.raises(ValueError, match="must be given to PeftModel.from_pretrained or load_adapter without a config"):
        PeftModel.from_pretrained(make_llama(), tmp_path / "masks", config=config())


def test_an_adapter_of_peft_is_no_export(tmp_path):
    with_masks().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="an adapter that PEFT saved, which holds scores: load it with PeftModel"):
        load_masks(make_llama(), tmp_path)
    with pytest.raises(ValueError, match="directory must be new, empty or an earlier export of masks"):
        save_masks(mask_model(make_llama(), MaskConfig()), tmp_path)


# ---------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_modules": ["q_porj"]}, "did you mean q_proj?"),
        ({"target_modules": ["embed_tokens"]}, r"embed_tokens \(Embedding\), not a linear layer"),
        ({"keep_ratio": 1.5}, r"keep_ratio must lie in \[0, 1\], got 1.5"),
        ({"scores_dtype": "int16"}, "scores_dtype must be float32 or bfloat16 under PEFT"),
    ],
)
def test_what_cannot_be_masked_is_refused_before_the_model_changes(changes, message):
    base = make_llama()
    with pytest.raises(ValueError, match=message):
        with_masks(base, **changes)
    assert_same(state(base), state(make_llama()))
    assert all(p.requires_grad for p in base.parameters())


def test_a_failed_second_mask_leaves_the_first_as_it_was():
    model = with_masks()
    masked = logits(model)
    with pytest.raises(ValueError, match="did you mean q_proj?"):
        model.add_adapter("other", config(target_modules=["q_porj"]))
    assert list(model.peft_config) == ["default"]
    assert torch.equal(logits(model), masked)


# ---------------------------------------------------------------------------------------------- PEFT itself


@pytest.mark.parametrize("version", ["0.20.0", "0.22.0"])
def test_a_version_of_peft_that_was_not_tried_is_refused(monkeypatch, version):
    monkeypatch.delitem(sys.modules, "mft.masks.peft")
    monkeypatch.setattr(peft, "__version__", version)
    with pytest.raises(ImportError, match=f"got {version}: pip install 'peft>="):
        importlib.import_module("mft.masks.peft")


def test_a_missing_peft_is_told(monkeypatch):
    monkeypatch.delitem(sys.modules, "mft.masks.peft")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"mft.masks.peft needs peft >= 0.*: pip install 'peft>="):
        importlib.import_module("mft.masks.peft")


@pytest.mark.slow
def test_our_own_api_does_without_peft():
    code = "import sys, mft; mft.mask_model; mft.save_masks; assert 'peft' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_adapter_from_before_a_budget_was_a_bound_keeps_the_rule_that_it_began_with(tmp_path):
    MaskPeftConfig(budget=0.1, mode="value", fill_budget=True).save_pretrained(str(tmp_path))
    path = tmp_path / "adapter_config.json"
    values = json.loads(path.read_text())
    assert values.pop("fill_budget") is True
    path.write_text(json.dumps(values))
    assert MaskPeftConfig.from_pretrained(str(tmp_path)).fill_budget is True
