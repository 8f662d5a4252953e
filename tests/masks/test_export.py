"""save_masks, load_masks and base_hash: what is loaded equals what was saved bit for bit, or is refused."""

import copy
import dataclasses
import json
import os

import pytest
import safetensors.torch
import torch
from exports import CONFIG, MASKS, UP, assert_same_tensors, edit_config, edit_masks, llama, masks
from tiny_architectures import TOKENS
from tiny_mixtures import mixture
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

import mft
from mft.config import CODINGS, MaskConfig
from mft.files import weights_hash
from mft.masks.convert import mask_model, masked_modules, merge_model
from mft.masks.export import base_hash, load_masks, recode_masks, save_masks
from mft.masks.export_format import read_export, read_whole_export
from mft.masks.saved_modules import train_whole


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(**TOKENS, n_embd=36, n_layer=2, n_head=4, n_positions=64))


BASES = {"llama": llama, "bfloat16": lambda: llama().to(torch.bfloat16), "gpt2": gpt2}


# ---------------------------------------------------------------------------------------------- the round trip


def test_an_average_of_the_scores_that_takes_their_place_is_what_is_saved(masked, tmp_path):
    """torch_ema's average_parameters() does this: through .data, and back."""
    ids = torch.arange(8)[None]
    raw, loss = masks(masked), masked(ids, labels=ids).loss
    parameters = [p for p in masked.parameters() if p.requires_grad]
    stored = [p.clone() for p in parameters]
    for p in parameters:
        p.data.copy_(p.data.flip(0))
    averaged = masked(ids, labels=ids).loss
    save_masks(masked, tmp_path / "averaged")
    for p, own in zip(parameters, stored):
        p.data.copy_(own.data)
    again = load_masks(llama(), tmp_path / "averaged")
    assert averaged != loss
    assert again(ids, labels=ids).loss == averaged
    assert masked(ids, labels=ids).loss == loss
    assert_same_tensors(masks(masked), raw)


@pytest.mark.parametrize("mode", ["magnitude", "value"])
@pytest.mark.parametrize("base", BASES)
def test_masks_come_back_exactly_on_a_fresh_base(base, mode, tmp_path):
    rule = {"keep_ratio": 0.9} if mode == "magnitude" else {"threshold": 0.005}
    model = mask_model(BASES[base](), MaskConfig(layers_to_transform=[1], init="normal", mode=mode, **rule))
    save_masks(model, tmp_path / "export")
    loaded = load_masks(BASES[base](), tmp_path / "export")
    assert_same_tensors(masks(loaded), masks(model))
    assert_same_tensors(merge_model(loaded).state_dict(), merge_model(model).state_dict())


def test_masks_come_back_onto_a_masked_model(masked, saved):
    other = mask_model(llama(), MaskConfig.paper(layers_to_transform=[1, 2], seed=7))
    before = masks(other)[UP]
    load_masks(other, saved)
    assert not torch.equal(before, masks(other)[UP])
    assert_same_tensors(masks(other), masks(masked))


@pytest.mark.parametrize("mode", ["magnitude", "value"])
def test_a_loaded_mask_still_trains_both_ways(mode, tmp_path):
    rule = {"keep_ratio": 0.9} if mode == "magnitude" else {"threshold": 0.0}
    save_masks(mask_model(llama(), MaskConfig(init="normal", mode=mode, **rule)), tmp_path / "export")
    model = load_masks(llama(), tmp_path / "export")
    tokens = torch.arange(3, 21).reshape(2, 9)
    model(input_ids=tokens, labels=tokens).loss.backward()
    module = masked_modules(model)[UP]
    assert all(module.scores.grad[keep].abs().sum() > 0 for keep in (module.mask(), ~module.mask()))
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [
        f"{name}.scores" for name in masked_modules(model)
    ]


def test_a_run_is_loaded_by_its_directory_too(masked, tmp_path):
    save_masks(masked, tmp_path / "run" / "masks")
    (tmp_path / "run" / "config.yaml").touch()
    assert_same_tensors(masks(load_masks(llama(), tmp_path / "run")), masks(masked))


@pytest.mark.slow
def test_a_compiled_model_is_saved_loaded_and_merged_as_what_it_holds(masked, tmp_path):
    ids = torch.arange(12).view(1, -1)

    def compiled(model):
        return torch.compile(model, backend="eager")

    with torch.no_grad():
        expected = masked(ids).logits
        save_masks(compiled(masked), tmp_path / "export")
        assert (tmp_path / "export" / CONFIG).read_text().count("_orig_mod") == 0
        loaded = compiled(llama())
        dense = loaded(ids).logits
        assert load_masks(loaded, tmp_path / "export") is loaded
        found = loaded(ids).logits  # code compiled before the masks is not used again
        merged = merge_model(loaded)
        assert type(merged) is LlamaForCausalLM
        assert not masked_modules(loaded)
        torch.testing.assert_close(found, expected)
        assert not torch.allclose(dense, expected)
        torch.testing.assert_close(merged(ids).logits, expected)
        torch.testing.assert_close(loaded(ids).logits, expected)


@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.parametrize("keep_ratio", [0.0, 1.0])
def test_keeping_all_or_none_survives(keep_ratio, coding, tmp_path):
    model = mask_model(llama(), MaskConfig.paper(target_modules=["up_proj"], keep_ratio=keep_ratio))
    loaded = load_masks(llama(), save_masks(model, tmp_path / "export", coding=coding))
    assert {float(mask.float().mean()) for mask in masks(loaded).values()} == {keep_ratio}


def test_the_files_have_one_bit_a_weight_and_pefts_names(masked, saved):
    assert sorted(os.listdir(saved)) == [CONFIG, MASKS]
    tensors = safetensors.torch.load_file(saved / MASKS)
    assert {(t.dtype, t.shape) for t in tensors.values() if t.shape[0] == 48} == {(torch.int32, (48, 2))}
    assert tensors.keys() == {f"{name}.mask" for name in masked_modules(masked)}
    config = json.loads((saved / CONFIG).read_text())
    assert (config["peft_type"], config["format_version"], config["mode"]) == ("MFT", 2, "magnitude")
    assert (config["keep_ratio"], config["layers_to_transform"]) == (0.9, [1, 2])
    assert config["target_modules"] == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    entry = next(entry for entry in config["modules"] if entry["name"] == UP)
    assert entry == {"name": UP, "shape": [48, 40], "dtype": "float32", "kept": int(masks(masked)[UP].sum())}
    assert config["base_hash"] == base_hash(masked)


def test_the_base_is_named_by_argument_or_by_where_it_was_loaded_from(masked, tmp_path):
    def noted(directory):
        return json.loads((directory / CONFIG).read_text())["base_model_name_or_path"]

    assert noted(save_masks(masked, tmp_path / "a", base_model_name_or_path="org/base")) == "org/base"
    assert noted(save_masks(masked, tmp_path / "b")) is None
    masked.config._name_or_path = "some/dir"
    assert noted(save_masks(masked, tmp_path / "c")) == "some/dir"


# ---------------------------------------------------------------------------------------------- entropy-coded


def test_a_new_export_is_entropy_coded_unless_packed_is_asked_for(masked, tmp_path):
    assert mft.RunConfig().coding == "rice"
    asked = save_masks(masked, tmp_path / "asked", system_prompt="Sort tickets.")
    assert read_export(asked).system_prompt == read_export(recode_masks(asked, asked, coding="packed")).system_prompt
    assert read_export(asked).system_prompt == "Sort tickets."
    assert "system_prompt" not in json.loads((save_masks(masked, tmp_path / "unasked") / CONFIG).read_text())
    assert contents(save_masks(masked, tmp_path / "new")) == contents(save_masks(masked, tmp_path / "c", coding="rice"))
    assert read_export(tmp_path / "new").coding == "rice"


@pytest.mark.parametrize("base", [*BASES, "experts"])
def test_coded_masks_come_back_exactly_and_are_the_same_content(base, tmp_path):
    make = BASES.get(base, lambda: mixture("Olmoe"))
    model = mask_model(make(), MaskConfig.paper(layers_to_transform=[1], keep_ratio=0.97))
    packed, coded, by_weight = (save_masks(model, tmp_path / coding, coding=coding) for coding in CODINGS)
    for directory in (coded, by_weight):
        assert_same_tensors(masks(load_masks(make(), directory)), masks(model))
    described, words, _ = read_whole_export(packed)
    assert read_export(coded) == dataclasses.replace(described, coding="rice")  # with the same content_hash
    assert_same_tensors(read_whole_export(coded)[1], words)
    sizes = {key: t.numel() for key, t in safetensors.torch.load_file(coded / MASKS).items()}
    assert sizes == {f"{name}.mask": mft.coded_size(mask) for name, mask in masks(model).items()}
    assert sum(sizes.values()) < 0.4 * sum(w.nbytes for w in words.values())
    assert read_export(by_weight) == dataclasses.replace(described, coding="by_weight")
    sizes = {key: t.numel() for key, t in safetensors.torch.load_file(by_weight / MASKS).items()}
    layers = masked_modules(model)
    assert sizes == {f"{name}.mask": mft.coded_size(layer.mask(), layer.weight) for name, layer in layers.items()}


def test_coded_exports_are_of_formats_3_and_4_and_others_as_they_were(masked, tmp_path):
    found = {c: json.loads((save_masks(masked, tmp_path / c, coding=c) / CONFIG).read_text()) for c in CODINGS}
    assert found["packed"]["format_version"] == 2
    assert found["rice"] == found["packed"] | {"format_version": 3, "coding": "rice"}
    assert found["by_weight"] == found["packed"] | {"format_version": 4, "coding": "by_weight"}


def test_recoding_gives_what_saving_would_have_given_and_needs_no_base(masked, tmp_path):
    train_whole(masked, ["model.norm"])
    packed, coded, by_weight = (contents(save_masks(masked, tmp_path / c, coding=c)) for c in CODINGS)
    assert contents(mft.recode_masks(tmp_path / "packed", tmp_path / "other")) == coded
    assert contents(mft.recode_masks(tmp_path / "other", tmp_path / "other", coding="packed")) == packed
    with pytest.raises(ValueError, match="directory must be new, empty or an earlier export of masks"):
        mft.recode_masks(tmp_path / "other", tmp_path)
    other, base = tmp_path / "other", llama()  # only by_weight uses the base
    assert contents(mft.recode_masks(other, other, coding="by_weight", model=base)) == by_weight
    assert contents(mft.recode_masks(other, other, model=base)) == coded


def test_masks_by_weight_are_read_and_written_with_the_weights_that_they_were_learned_on(masked, tmp_path):
    path = save_masks(masked, tmp_path / "masks", coding="by_weight", base_model_name_or_path="org/base")
    assert_same_tensors(masks(load_masks(masked, path)), masks(masked))  # also onto a masked model
    other = llama()
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight[3, 5] += 1
    for force in (False, True):
        with pytest.raises(ValueError, match=r"expected base sha256:.*read with exactly the weights .*: mft recode"):
            load_masks(other, path, force=force)
        assert not masked_modules(other)
    with pytest.raises(ValueError, match="expected base sha256"):
        mft.recode_masks(path, tmp_path / "new", model=other)
    with pytest.raises(ValueError, match="weights of their base, org/base, got none: mft recode .*--coding rice"):
        mft.recode_masks(path, tmp_path / "new")
    alone = mft.recode_masks(path, tmp_path / "alone", model=llama())
    with pytest.raises(ValueError, match="coding by_weight needs the base's weights to write, got masks alone"):
        mft.recode_masks(alone, tmp_path / "new", coding="by_weight")
    assert not (tmp_path / "new").exists()


def test_an_old_export_has_a_content_hash_once_it_is_recoded(saved, tmp_path):
    expected = contents(mft.recode_masks(saved, tmp_path / "recoded"))
    edit_config(saved, format_version=1, content_hash=KeyError)
    assert contents(mft.recode_masks(saved, tmp_path / "recoded")) == expected


def contents(directory):
    return {name: (directory / name).read_bytes() for name in os.listdir(directory)}


# ---------------------------------------------------------------------------------------------- the base's hash


@pytest.mark.parametrize("base", BASES)
def test_the_hash_of_a_masked_model_is_its_bases(base):
    fresh = BASES[base]()
    model = mask_model(copy.deepcopy(fresh), MaskConfig.paper())
    assert base_hash(model) == base_hash(fresh, reversed(list(masked_modules(model))))


@pytest.mark.parametrize("change", ["weight", "dtype", "name", "chunks"])
def test_the_hash_sees_weight_dtype_and_name_but_not_its_chunks(change, monkeypatch):
    names, others = [UP], [UP]
    model = llama().to(torch.float16)
    if change == "dtype":  # both have the same bytes
        nn.init.zeros_(model.get_submodule(UP).weight)
    expected = base_hash(model, names)
    if change == "weight":
        with torch.no_grad():
            model.get_submodule(UP).weight[3, 4] += 1
    elif change == "dtype":
        model.to(torch.bfloat16)
    elif change == "name":
        others = ["model.layers.0.mlp.up_proj"]
        model.get_submodule(others[0]).weight.data.copy_(model.get_submodule(UP).weight)
    else:
        monkeypatch.setattr(weights_hash, "_CHUNK", 500)
    assert (base_hash(model, others) == expected) == (change == "chunks")


# ---------------------------------------------------------------------------------------------- what does not fit


def test_a_model_without_the_layers_is_refused(saved):
    with pytest.raises(ValueError, match="model has no linear layer named 'model.layers.1.self_attn.q_proj'"):
        load_masks(gpt2(), saved)


def test_an_export_that_names_the_head_is_refused(saved):
    config = json.loads((saved / CONFIG).read_text())
    entry = {"name": "lm_head", "shape": [64, 40], "dtype": "float32", "kept": 0}
    edit_config(saved, modules=[*config["modules"], entry], format_version=1, content_hash=KeyError)
    edit_masks(saved, lambda t: t.update({"lm_head.mask": torch.zeros(64, 2, dtype=torch.int32)}))
    with pytest.raises(ValueError, match="lm_head is the output embedding, which is never masked"):
        load_masks(llama(), saved, force=True)


# ---------------------------------------------------------------------------------------------- writing


def test_nan_scores_are_not_saved(masked, tmp_path):
    with torch.no_grad():
        masked_modules(masked)[UP].scores[0, 0] = float("nan")
    with pytest.raises(ValueError, match=UP):
        save_masks(masked, tmp_path / "export")
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model.safetensors": "x"}, "new, empty or an earlier export of masks, got .*target, which holds model.safe"),
        ({CONFIG: '{"peft_type": "LORA"}'}, f"which holds {CONFIG}: choose another one"),
        ({CONFIG: '{"peft_type": "MFT"}', "notes.txt": "mine"}, r"holds more than an export \(notes.txt\), which"),
    ],
)
def test_what_is_not_an_export_is_not_overwritten(masked, tmp_path, content, message):
    target = tmp_path / "target"
    target.mkdir()
    for name, text in content.items():
        (target / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        save_masks(masked, target)
    assert {name: (target / name).read_text() for name in os.listdir(target)} == content


def test_files_and_links_are_not_overwritten(masked, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path)
    for name, kind in {"file": "a file", "link": "a symbolic link"}.items():
        with pytest.raises(ValueError, match=f"must be a directory, or not exist yet, got {kind}: .*{name}"):
            save_masks(masked, tmp_path / name)
