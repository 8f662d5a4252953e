"""Helpers that tests of exports share: the exported Llama, its masks, and edits of the two files."""

import json

import safetensors.torch
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mft.masks.convert import masked_modules

TOKENS = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
CONFIG, MASKS = "adapter_config.json", "adapter_model.safetensors"
UP = "model.layers.1.mlp.up_proj"


def llama(hidden_size=40):
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            **TOKENS,
            hidden_size=hidden_size,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
        )
    )


def masks(model):
    return {name: module.mask() for name, module in masked_modules(model).items()}


def assert_same_tensors(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def edit_config(directory, **changes):
    path = directory / CONFIG
    values = json.loads(path.read_text())
    values.update({key: value for key, value in changes.items() if value is not KeyError})
    for key in [key for key, value in changes.items() if value is KeyError]:
        del values[key]
    path.write_text(json.dumps(values))


def edit_masks(directory, change):
    tensors = safetensors.torch.load_file(directory / MASKS)
    change(tensors)
    safetensors.torch.save_file(tensors, directory / MASKS)
