"""Checkpointing changes no gradient of a masked model, and the layers below its masks run without autograd."""

import pytest
import torch
from tiny_architectures import MODELS, llama
from torch import nn

from mft.config import MaskConfig
from mft.masks.convert import mask_model, masked_modules, merge_model


def score_grads(model, tokens):
    model.zero_grad()
    model(input_ids=tokens, labels=tokens).loss.backward()
    return {name: module.scores.grad.clone() for name, module in masked_modules(model).items()}


def checkpoint_activations(model, use_reentrant):
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": use_reentrant})


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("kind", ["llama", "gemma3", "gpt2", "opt"])
def test_gradient_checkpointing_changes_no_gradient(kind, use_reentrant, first, tokens):
    model = MODELS[kind][0]().train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.config.attention_dropout = 0.0
    for module in model.modules():
        if hasattr(module, "dropout") and isinstance(module.dropout, float):
            module.dropout = 0.0
    mask_model(model, MaskConfig.paper(layers_to_transform=list(range(first, 3))))
    expected = score_grads(model, tokens)
    checkpoint_activations(model, use_reentrant)
    for grads in (score_grads(model, tokens), score_grads(model, tokens)):
        assert grads.keys() == expected.keys()
        for name in grads:
            torch.testing.assert_close(grads[name], expected[name])


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_under_checkpointing_layers_below_the_first_masked_one_run_without_autograd(use_reentrant, tokens):
    model = mask_model(llama().train(), MaskConfig.paper(layers_to_transform=[2]))
    checkpoint_activations(model, use_reentrant)
    outputs, runs = {}, {0: 0, 1: 0, 2: 0}
    for index, layer in enumerate(model.model.layers):
        layer.register_forward_hook(lambda m, a, out, i=index: outputs.update({i: out}))
        layer.input_layernorm.register_forward_hook(lambda m, a, out, i=index: runs.update({i: runs[i] + 1}))
    model(input_ids=tokens, labels=tokens).loss.backward()
    assert [outputs[i].grad_fn is None for i in range(3)] == [True, True, False]
    assert runs == {0: 1, 1: 1, 2: 2}  # only the masked layer is recomputed


def test_a_trainable_embedding_still_gets_its_gradient_under_checkpointing(tokens):
    model = mask_model(llama().train(), MaskConfig(layers_to_transform=[2]))
    model.model.embed_tokens.weight.requires_grad_(True)
    checkpoint_activations(model, True)
    model(input_ids=tokens, labels=tokens).loss.backward()
    assert model.model.embed_tokens.weight.grad.abs().sum() > 0
    assert all(layer.gradient_checkpointing for layer in model.model.layers)  # those below run backward too


def test_merging_takes_the_hooks_away(tokens):
    model = mask_model(llama().train(), MaskConfig.paper(layers_to_transform=[2]))
    merge_model(model)
    assert not any(module._forward_pre_hooks for module in model.modules())
