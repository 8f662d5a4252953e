"""A merged model can be used elsewhere: transformers, and a GGUF file made from its files, give its weights and logits.

llama.cpp's converter brings its own gguf and is not installed next to ours. If MFT_LLAMA_CPP names a directory with
convert_hf_to_gguf.py, it converts SmolLM2 itself; for every Llama it imports sentencepiece, which we do not need.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gguf_models import read_gguf, write_gguf
from tiny_gguf import write_tiny_gguf
from transformers import AutoModelForCausalLM, AutoTokenizer

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
    merged = merge_model(mask_model(tiny_llama, MASK)).to(dtype).float()
    directory = save_model(merged, tokenizer, tmp_path / "merged")
    kind = {torch.float32: "F32", torch.float16: "F16"}[dtype]
    write_gguf(AutoModelForCausalLM.from_pretrained(directory), tmp_path / "merged.gguf", kind, tied=True)
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
