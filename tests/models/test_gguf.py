"""A merged model can be used elsewhere: transformers, and a GGUF file made from its files, give its weights and logits.

llama.cpp's converter brings its own gguf and is not installed next to ours. If MFT_LLAMA_CPP names a directory with
convert_hf_to_gguf.py, it converts SmolLM2 itself; for every Llama it imports sentencepiece, which we do not need.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import load_file
from tiny_gguf import write_tiny_gguf
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from mft.config import MaskConfig, ModelConfig
from mft.masks.convert import mask_model, masked_modules, merge_model
from mft.masks.export import load_masks, save_masks
from mft.models.pretrained import load_model, save_model

MASK = MaskConfig.paper(keep_ratio=0.7, seed=1)
TOKENS = torch.arange(40, 64).reshape(2, 12)


@torch.no_grad()
def logits(model):
    return model(TOKENS).logits


def assert_same_model(found, expected):
    """Assert equal weights, and logits equal up to rounding: the order of sums may depend on the weights' addresses."""
    weights, wanted = found.state_dict(), expected.state_dict()
    assert weights.keys() == wanted.keys()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in weights.items())
    y, tolerance = logits(expected), 1e-5 if expected.dtype == torch.float32 else 0.02
    assert (logits(found) - y).abs().max() <= tolerance * y.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merged_model_gives_its_logits_in_plain_transformers(tiny_llama, tokenizer, tmp_path, dtype):
    base = save_model(tiny_llama.to(dtype), tokenizer, tmp_path / "base")
    masks = save_masks(mask_model(tiny_llama, MASK), tmp_path / "masks")
    model, _ = load_model(ModelConfig(str(base), dtype=str(dtype).removeprefix("torch.")))
    before = logits(model)
    merged = merge_model(load_masks(model, masks))
    assert not torch.equal(logits(merged), before)
    directory = save_model(merged, tokenizer, tmp_path / "merged")
    assert_same_model(AutoModelForCausalLM.from_pretrained(directory).eval(), merged)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_files_of_a_merged_model_are_all_that_a_gguf_file_of_equal_logits_needs(
    tiny_llama, tokenizer, tmp_path, dtype
):
    merged = merge_model(mask_model(tiny_llama, MASK))
    directory = save_model(merged, tokenizer, tmp_path / "merged")
    write_gguf(directory, tmp_path / "merged.gguf", dtype)
    with torch.no_grad():
        for parameter in merged.parameters():
            parameter.copy_(parameter.to(dtype))
    assert_same_model(read_gguf(tmp_path / "merged.gguf"), merged)


def test_llama_cpps_converter_takes_a_merged_model(smollm2_dir, tmp_path):
    if not os.environ.get("MFT_LLAMA_CPP"):
        pytest.skip("needs MFT_LLAMA_CPP, a directory with llama.cpp's convert_hf_to_gguf.py")
    pytest.importorskip("sentencepiece", reason="the converter needs it: pip install sentencepiece")
    converter = Path(os.environ["MFT_LLAMA_CPP"]) / "convert_hf_to_gguf.py"
    model, tokenizer = load_model("smollm2-135m")
    names = list(masked_modules(mask_model(model, MASK)))
    directory = save_model(merge_model(model), tokenizer, tmp_path / "merged")
    path = tmp_path / "merged.gguf"
    command = [sys.executable, str(converter), str(directory), "--outtype", "bf16", "--outfile", str(path)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    found = read_gguf(path, torch.bfloat16)
    dropped = [found.get_submodule(name).weight.eq(0).float().mean().item() for name in names]
    assert dropped == pytest.approx([0.3] * len(names), abs=0.01)
    assert_same_model(found, model)
    ids = AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)("def f(x):\n    return 3 + x").input_ids
    assert ids == tokenizer("def f(x):\n    return 3 + x").input_ids


def test_a_gguf_file_with_a_tokenizer_of_sentencepiece_is_read_without_that_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    monkeypatch.setenv("MFT_CACHE", str(tmp_path / "cache"))
    write_tiny_gguf(tmp_path / "model.gguf", tokenizer="llama")
    _, tokenizer = load_model(ModelConfig(str(tmp_path / "model.gguf"), dtype="float32"))
    assert tokenizer.decode(tokenizer("abc cd").input_ids, skip_special_tokens=True) == "abc cd"


def test_a_file_of_the_same_name_in_the_working_directory_is_not_read_instead(tmp_path, monkeypatch):
    monkeypatch.setenv("MFT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "elsewhere").mkdir()
    write_tiny_gguf(tmp_path / "elsewhere" / "model.gguf")
    write_tiny_gguf(tmp_path / "model.gguf", down="Q4_0")
    monkeypatch.chdir(tmp_path)
    model, _ = load_model(ModelConfig("elsewhere/model.gguf", dtype="float32"))
    found = model.model.layers[0].mlp.down_proj.weight
    assert torch.equal(found, read_gguf(tmp_path / "elsewhere" / "model.gguf").model.layers[0].mlp.down_proj.weight)


def read_gguf(path, dtype=torch.float32):
    dense = GgufConfig(dequantize=True)
    return AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=str(path), dtype=dtype, quantization_config=dense
    ).eval()


def write_gguf(directory, path, dtype):
    """Write a Llama like llama.cpp's converter: names from gguf's table, rows of q and k in its order for rotations."""
    config = json.loads((directory / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_vocab_size(config["vocab_size"])
    for name, tensor in load_file(directory / "model.safetensors").items():
        count = heads.get(name.split(".")[-2])
        if count is not None:
            tensor = tensor.unflatten(0, (count, 2, -1)).transpose(1, 2).reshape(tensor.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), tensor.to(dtype).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
