"""Models that from_pretrained placed by a device_map: masked if they are on one device, otherwise refused by name."""

import pytest
import torch
from accelerate import dispatch_model
from tiny import make_llama, make_rows, masked_llama
from transformers import LlamaForCausalLM

from mft.config import MaskConfig
from mft.masks.convert import mask_model, masked_modules, merge_model

AROUND = ("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head")
LAYERS = [f"model.layers.{index}" for index in range(4)]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    make_llama().save_pretrained(path)
    return path


def loss_and_gradients(model):
    ids = torch.tensor(make_rows(2)["input_ids"][:])
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return [loss.detach(), *[module.scores.grad for module in masked_modules(model).values()]]


def assert_learns_as_if_never_placed(model):
    got, expected = loss_and_gradients(model), loss_and_gradients(masked_llama())
    assert len(got) == len(expected) == 1 + 2 * 7
    assert all(torch.equal(a, b) for a, b in zip(got, expected))


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}], ids=str)
def test_a_model_on_one_device_is_masked_and_learns(directory, device_map):
    model = LlamaForCausalLM.from_pretrained(directory, device_map=device_map)
    assert_learns_as_if_never_placed(mask_model(model, MaskConfig.paper(layers_to_transform=[2, 3])))


@pytest.mark.parametrize("layer", [0, 3])
def test_a_model_that_is_offloaded_in_part_is_refused_in_every_layer(directory, tmp_path, layer):
    device_map = dict.fromkeys(AROUND, "cpu") | dict.fromkeys(LAYERS, "cpu") | {LAYERS[3]: "disk"}
    model = LlamaForCausalLM.from_pretrained(directory, device_map=device_map, offload_folder=tmp_path)
    refusal = rf"layers\.{layer}\.self_attn\.q_proj: its forward is replaced .*load it on one device.* dispatch"
    with pytest.raises(ValueError, match=refusal):
        mask_model(model, MaskConfig(layers_to_transform=layer))
    assert not masked_modules(model)


def test_a_masked_model_may_be_dispatched_afterwards():
    # With the hooks that several devices would add; here all devices are the same.
    model = dispatch_model(masked_llama(), dict.fromkeys((*AROUND, *LAYERS), "cpu"), force_hooks=True)
    assert all(hasattr(module, "_hf_hook") for module in masked_modules(model).values())
    assert_learns_as_if_never_placed(model)
    ids = torch.arange(5, 12)[None]
    logits = model(ids).logits
    torch.testing.assert_close(merge_model(model)(ids).logits, logits)
