"""The unmasked model computes what the base computes, in the memory of the masked one."""

import copy

import pytest
import torch
from tiny import logits, make_llama, masked_llama
from tiny_architectures import MODELS
from torch import nn

from mft import MaskConfig, mask_model, masked_modules, merge_model, quantize_model, unmasked_model


@pytest.mark.parametrize("make", [make_llama, MODELS["opt"][0]])
def test_it_computes_what_the_base_did_bit_for_bit_whatever_the_scores_learn(make):
    base = make().eval()
    masked = mask_model(copy.deepcopy(base), MaskConfig.paper())
    made = unmasked_model(masked.train())
    with torch.no_grad():
        for module in masked_modules(masked).values():
            module.scores.neg_().add_(0.01)
    assert not made.training
    assert masked.training
    assert torch.equal(logits(made), logits(base))
    assert not torch.equal(logits(masked.eval()), logits(base))
    assert [type(m) for m in made.modules()] == [type(m) for m in base.modules()]
    assert {*made.state_dict()} == {*base.state_dict()}


def test_a_conv1d_is_a_linear_layer_that_computes_the_same():
    base = MODELS["gpt2"][0]().eval()
    made = unmasked_model(mask_model(copy.deepcopy(base), MaskConfig.paper()))
    torch.testing.assert_close(logits(made), logits(base))


def test_no_tensor_of_it_is_its_own():
    masked = masked_llama()
    made = unmasked_model(masked)
    tensors = [*made.parameters(), *made.buffers()]
    assert {t.data_ptr() for t in tensors} <= {t.data_ptr() for t in [*masked.parameters(), *masked.buffers()]}
    assert not any(p.requires_grad for p in made.parameters())
    assert all(module.scores.requires_grad for module in masked_modules(masked).values())
    assert merge_model(masked).model.layers[0].mlp.up_proj.weight.data_ptr() in {t.data_ptr() for t in tensors}


def test_a_forward_that_a_trainer_put_over_the_model_s_is_left_behind():
    masked = masked_llama()
    forward = masked.forward
    masked.forward = lambda *args, **kwargs: forward(*args, **kwargs)  # bound to the masked model
    assert torch.equal(logits(unmasked_model(masked)), logits(make_llama()))


@pytest.mark.parametrize("masked", [False, True])
def test_on_a_quantised_base_it_is_quantised(masked):
    base = quantize_model(make_llama().requires_grad_(False), "int8")
    made = unmasked_model(quantize_model(masked_llama(), "int8", masked=masked))
    if masked:
        assert torch.equal(logits(made), logits(base))
    else:
        mixed = make_llama()
        mixed.model.layers = nn.ModuleList([*base.model.layers[:2], *mixed.model.layers[2:]])
        assert torch.equal(logits(made), logits(mixed))


def hooked():
    model = masked_llama()
    model.model._hf_hook = object()
    return model


REFUSED = {
    "no mask": (make_llama, "must have masked layers, got a LlamaForCausalLM without"),
    "dispatched": (hooked, "must lie on one device, got hooks of accelerate's at model: "),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_model_without_an_untouched_base_is_refused(kind):
    make, message = REFUSED[kind]
    with pytest.raises(ValueError, match=message):
        unmasked_model(make())
