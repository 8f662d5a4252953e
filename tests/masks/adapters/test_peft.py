"""Masks under PEFT: bitwise equal to our own API, and what PEFT expects of every method.

All after the first part follows the tests that PEFT runs on its own methods (huggingface/peft,
tests/testing_common.py, Apache 2.0), by subject and in our words. test_peft_suite.py runs the originals, if a checkout
of PEFT is given.
"""

import importlib
import json
import subprocess
import sys

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft_masks import SETTING, STILL_CALLED, UP, assert_same, config, layers, two_masks, with_masks
from safetensors.torch import load_file
from tiny import TOKENS, logits, make_llama
from tiny_architectures import state
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForSequenceClassification

from mft import MaskConfig, load_masks, mask_model, masked_modules, merge_model, save_masks
from mft.masks.peft import MaskPeftConfig, to_masked_model

pytestmark = STILL_CALLED


def make_gpt2(dtype=torch.float32):
    config = {"vocab_size": 61, "n_positions": 16, "n_embd": 32, "n_layer": 4, "n_head": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return GPT2LMHeadModel(GPT2Config(bos_token_id=0, eos_token_id=0, **config)).to(dtype).eval()


BASES = {
    "llama": make_llama,
    "llama in bf16": lambda: make_llama(torch.bfloat16),
    "gpt2": make_gpt2,  # Conv1D
}


def scores(model):
    """Return the scores of our masked layers, or of PEFT's default adapter, by module."""
    found = {layer.module_name: layer.mft_scores["default"].detach() for layer in layers(model)}
    return found or {name: module.scores.detach() for name, module in masked_modules(model).items()}


def gradients(model):
    model.zero_grad()
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    return {
        name.replace("base_model.model.", "").replace("mft_scores.default", "scores"): p.grad.clone()
        for name, p in model.named_parameters()
        if p.grad is not None
    }


# ---------------------------------------------------------------------------------------------- equal to our own API


@pytest.mark.parametrize("make", BASES.values(), ids=BASES)
def test_logits_and_gradients_are_those_of_mask_model_bit_for_bit(make):
    ours, model = mask_model(make(), MaskConfig(**SETTING)), with_masks(make())
    assert torch.equal(logits(model), logits(ours))
    assert not torch.equal(logits(model), logits(make()))
    assert_same(gradients(model), gradients(ours))


@pytest.mark.parametrize("make", BASES.values(), ids=BASES)
def test_merge_and_unload_gives_the_model_of_merge_model_bit_for_bit(make):
    expected = merge_model(mask_model(make(), MaskConfig(**SETTING)))
    merged = with_masks(make()).merge_and_unload()
    assert [type(module) for module in merged.modules()] == [type(module) for module in expected.modules()]
    assert_same(state(merged), state(expected))
    assert not hasattr(merged, "peft_config")


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


def test_inputs_embeds_and_generate_work():
    model = with_masks()
    embeddings = model.get_input_embeddings()(TOKENS)
    with torch.no_grad():
        assert torch.equal(model(inputs_embeds=embeddings).logits, logits(model))
    generated = model.generate(input_ids=TOKENS, max_new_tokens=3, do_sample=False)
    assert generated.shape == (3, TOKENS.shape[1] + 3)


@pytest.mark.parametrize("scores_dtype", ["float32", "bfloat16"])
def test_casting_the_model_leaves_the_scores_alone(scores_dtype):
    model = with_masks(scores_dtype=scores_dtype).to(torch.float16)
    assert {layer.mft_scores["default"].dtype for layer in layers(model)} == {getattr(torch, scores_dtype)}
    assert {layer.weight.dtype for layer in layers(model)} == {torch.float16}


# ---------------------------------------------------------------------------------------------- files


def test_what_is_saved_is_loaded_bit_for_bit_and_trains_on(tmp_path):
    model = two_masks()
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        *("README.md", "adapter_config.json", "adapter_model.safetensors", "other"),
    }
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert {key.rpartition(".")[2] for key in stored} == {"mft_scores"}
    loaded = PeftModel.from_pretrained(make_llama(), tmp_path, is_trainable=True)
    result = loaded.load_adapter(tmp_path / "other", "other")
    assert result.missing_keys == []
    assert_same(state(loaded), state(model))
    assert_same(gradients(loaded), gradients(model))
    frozen = PeftModel.from_pretrained(make_llama(), tmp_path)
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


@pytest.mark.parametrize("make", [make_llama, make_gpt2])
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


def test_an_adapted_layer_is_refused():
    model = inject_adapter_in_model(LoraConfig(target_modules=["q_proj"]), make_llama())
    del model.peft_config
    with pytest.raises(ValueError, match="cannot mask model.layers.2.self_attn.q_proj: it is a peft.tuners.lora"):
        inject_adapter_in_model(config(), model)


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
