"""Helpers that tests of exports share: the exported Llama, its masks, and edits of the two files."""

import json

import safetensors.torch
import tiny_architectures
import torch

from mft.masks.convert import masked_modules

CONFIG, MASKS = "adapter_config.json", "adapter_model.safetensors"
UP = "model.layers.1.mlp.up_proj"


def llama(hidden_size=40):
    torch.manual_seed(0)
    return tiny_architectures.llama(hidden_size=hidden_size)


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
