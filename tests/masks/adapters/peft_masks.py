"""Masks as a PEFT adapter on a tiny Llama, and the comparisons that tests make."""

import pytest
import torch
from peft import get_peft_model
from tiny import make_llama
from tiny_mixtures import mixture

from mft.masks.convert import masked_modules
from mft.masks.peft import MaskPeftConfig
from mft.masks.peft_layers.layer import MaskLinear

# PEFT 0.21 still calls this in transformers 5.24.
STILL_CALLED = pytest.mark.filterwarnings(
    "ignore:.*gradient_checkpointing.* is deprecated and will be removed:FutureWarning"
)
UP = "model.layers.2.mlp.up_proj"
SETTING = {"layers_to_transform": [2, 3], "keep_ratio": 0.7, "init": "normal"}


def config(**changes):
    return MaskPeftConfig(**SETTING | {"task_type": "CAUSAL_LM"} | changes)


def with_masks(base=None, **changes):
    return get_peft_model(make_llama() if base is None else base, config(**changes)).eval()


# The base, its first mask, and the second.
TWO = {
    "llama": (make_llama, {}, {"layers_to_transform": [1, 2], "keep_ratio": 0.5, "seed": 1}),
    "experts": (
        lambda: mixture("Olmoe"),
        {"layers_to_transform": None},
        {"layers_to_transform": None, "keep_ratio": 0.5, "seed": 1, "target_parameters": ["experts.down_proj"]},
    ),
}


def two_masks(kind="llama"):
    """Return two masks of different weights, ratios and seeds on one base; the first is active."""
    base, first, second = TWO[kind]
    model = with_masks(base(), **first)
    model.add_adapter("other", config(**second))
    return model


def layers(model):
    return [module for module in model.modules() if isinstance(module, MaskLinear)]


def assert_same(found, expected):
    """Assert bitwise equality, NaN and -0.0 included."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert tensor.dtype == found[name].dtype, name
        assert torch.equal(*(t.contiguous().view(torch.uint8) for t in (found[name], tensor))), name


def scores(model):
    """Return the scores of our masked layers, or of PEFT's default adapter, by module."""
    found = {layer.module_name: layer.mft_scores["default"].detach().clone() for layer in layers(model)}
    return found or {name: module.scores.detach().clone() for name, module in masked_modules(model).items()}
