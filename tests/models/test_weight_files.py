"""A model that is loaded without its weights reads them from its files, whole or by rows, as from_pretrained does."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import make_phi3, save_llama
from tiny_architectures import MIXTURES, MODELS, gpt2, llama, mixtral, opt
from transformers import LlamaConfig

from mft.config import ModelConfig
from mft.models.pretrained import load_model, load_unread
from mft.models.weight_files import are_readable, weight_files

MADE = {
    "llama": llama,
    "tied": lambda: llama(tie_word_embeddings=True),
    "gpt2": gpt2,
    "opt": opt,
    "gemma3": MODELS["gemma3"][0],
    "phi3": make_phi3,
    "mixtral": mixtral,
    **MIXTURES,
}
SEVERAL = "20KB"  # the size of a file, so that a model takes several


def saved(directory, name, size=SEVERAL):
    save_llama(directory)  # the tokenizer
    for path in directory.glob("*.safetensors"):
        path.unlink()
    torch.manual_seed(0)
    MADE[name]().save_pretrained(directory, max_shard_size=size)


def both(directory, dtype="float32"):
    config = ModelConfig(str(directory), dtype=dtype)
    return load_model(config)[0], load_unread(config)[0]


def parameters(model):
    return dict(model.named_parameters(remove_duplicate=False))


def shared(model):
    """Return the first name of each parameter's memory, by its name."""
    found = parameters(model)
    return {name: next(n for n, other in found.items() if other is p) for name, p in found.items()}


def rewrite(directory, change):
    """Apply change to the tensors of a model in one file."""
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", MADE)
def test_weights_read_from_files_are_those_of_from_pretrained(name, dtype, tmp_path):
    saved(tmp_path, name)
    model, unread = both(tmp_path, dtype)
    files, found = weight_files(unread), parameters(unread)
    assert weight_files(model) is None
    assert found.keys() == parameters(model).keys()
    assert shared(unread) == shared(model)
    for key, p in parameters(model).items():
        assert (found[key].is_meta, found[key].dtype, found[key].shape) == (True, p.dtype, p.shape), key
        assert torch.equal(files.read(key), p), key
        for first, count in ((0, len(p) // 3), (len(p) - 2, 2), (len(p), 0)):
            rows = files.read(key, first, count)
            assert rows.dtype == p.dtype, key
            assert torch.equal(rows, p[first : first + count]), key
    buffers = dict(unread.named_buffers())
    assert buffers.keys() == dict(model.named_buffers()).keys()
    assert all(torch.equal(buffers[key], buffer) for key, buffer in model.named_buffers())


@pytest.mark.parametrize("present", ["head alone", "both, equal", "both, different"])
def test_ties_follow_the_files(present, tmp_path):
    saved(tmp_path, "tied", size="1GB")

    def change(tensors):
        own = tensors["model.embed_tokens.weight"].clone()
        tensors["lm_head.weight"] = own + 1 if present == "both, different" else own
        if present == "head alone":
            del tensors["model.embed_tokens.weight"]

    rewrite(tmp_path, change)
    model, unread = both(tmp_path)
    assert shared(unread) == shared(model)
    assert all(torch.equal(weight_files(unread).read(key), p) for key, p in parameters(model).items())


def test_a_missing_weight_is_refused(tmp_path):
    saved(tmp_path, "llama", size="1GB")
    rewrite(tmp_path, lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(ValueError, match="must hold every weight of a LlamaForCausalLM, 1 are missing, such as model"):
        load_unread(ModelConfig(str(tmp_path), dtype="float32"))


def test_a_weight_of_another_shape_is_refused(tmp_path):
    saved(tmp_path, "llama", size="1GB")
    rewrite(tmp_path, lambda tensors: tensors.update({"model.norm.weight": torch.ones(3)}))
    with pytest.raises(ValueError, match=r"model.norm.weight must have the model's shape \(32,\), the file has \(3,\)"):
        load_unread(ModelConfig(str(tmp_path), dtype="float32"))


def test_what_is_read_is_neither_codes_nor_under_other_names(tmp_path):
    saved(tmp_path, "llama")
    assert are_readable(LlamaConfig(), tmp_path)
    assert not are_readable(LlamaConfig(quantization_config={"quant_method": "fp8"}), tmp_path)
    assert not are_readable(LlamaConfig(transformers_weights="other.safetensors"), tmp_path)
    assert not are_readable(LlamaConfig(), tmp_path / "elsewhere")
