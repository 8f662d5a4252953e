"""mask_model and merge_model on tiny models of every supported kind: results, memory, and the way back."""

import copy
import pickle
from functools import partial

import pytest
import torch
from tiny_architectures import MODELS, gpt2, llama, names, state
from tiny_mixtures import KINDS, mixture
from torch import nn
from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration
from transformers.pytorch_utils import Conv1D

from mft.config import MaskConfig
from mft.masks.convert import mask_model, masked_modules, merge_model, print_trainable_parameters, trainable_parameters
from mft_kernels import MaskedLinear


@pytest.mark.parametrize("kind", MODELS)
class TestEveryArchitecture:
    def test_attention_and_mlp_are_masked_and_nothing_else(self, kind):
        build, layers, linears = MODELS[kind]
        model = mask_model(build(), MaskConfig())
        assert names(model) == [f"{layers}.{index}.{linear}" for index in range(3) for linear in linears]

    def test_all_but_the_scores_is_frozen_and_every_score_gets_a_gradient(self, kind, tokens):
        model = mask_model(MODELS[kind][0](), MaskConfig(layers_to_transform=[1, 2]))
        model(input_ids=tokens, labels=tokens).loss.backward()
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        assert trained == {f"{name}.scores" for name in names(model)}
        assert {name for name, p in model.named_parameters() if p.grad is not None} == trained

    def test_keeping_everything_computes_what_the_base_computes(self, kind, tokens):
        base = MODELS[kind][0]().eval()
        masked = mask_model(copy.deepcopy(base), MaskConfig(keep_ratio=1.0))
        torch.testing.assert_close(masked(input_ids=tokens).logits, base(input_ids=tokens).logits)


BASES = {name: make for name, (make, *_) in MODELS.items()} | {kind: partial(mixture, kind) for kind in KINDS}


@pytest.mark.parametrize("kind", BASES)
def test_merging_gives_the_original_classes_with_kept_weights_bit_equal(kind, tokens):
    base = BASES[kind]().eval()
    model, part = (mask_model(copy.deepcopy(base), MaskConfig.paper(keep_ratio=0.7)) for _ in range(2))
    start, expected = state(base), state(base)
    for name, module in masked_modules(model).items():
        mask = module.mask()
        is_conv = name not in expected and isinstance(base.get_submodule(name), Conv1D)
        weight = expected[name if name in expected else f"{name}.weight"]
        weight.masked_fill_(~(mask.t() if is_conv else mask), 0.0)
    logits = model(input_ids=tokens).logits
    assert merge_model(model) is model
    assert [type(m) for m in model.modules()] == [type(m) for m in base.modules()]
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in base.named_parameters()]
    merged = state(model)
    assert merged.keys() == expected.keys()
    for name in merged:
        assert torch.equal(merged[name].view(torch.int32), expected[name].view(torch.int32)), name
    torch.testing.assert_close(model(input_ids=tokens).logits, logits)
    for name, weight in state(merge_model(part, alpha=0.75)).items():  # that far from the base to the masked model
        exact = start[name].double() + 0.75 * (expected[name].double() - start[name].double())
        assert torch.equal(weight, exact.float()), name


def test_dropped_negative_weights_merge_to_positive_zero():
    model = llama()
    nn.init.constant_(model.model.layers[0].mlp.up_proj.weight, -1.0)
    merge_model(mask_model(model, MaskConfig.paper(target_modules=["up_proj"], keep_ratio=0.5)))
    weight = model.model.layers[0].mlp.up_proj.weight
    assert (weight == 0).any()
    assert not torch.signbit(weight[weight == 0]).any()


def test_weights_are_shared_with_the_base_not_copied():
    model = llama()
    address = model.model.layers[0].mlp.up_proj.weight.data_ptr()
    mask_model(model, MaskConfig())
    assert model.model.layers[0].mlp.up_proj.weight.data_ptr() == address


def test_a_routed_seq2seq_model_is_masked_in_its_linear_experts():
    sizes = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4, "num_experts": 3}
    sizes |= dict.fromkeys(("num_layers", "num_decoder_layers"), 2)
    config = SwitchTransformersConfig(**sizes, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1)
    model = mask_model(SwitchTransformersForConditionalGeneration(config), MaskConfig())
    stacks, sparse_layers, experts, linears = 2, 1, 3, 2
    assert sum(".experts.expert_" in name for name in names(model)) == stacks * sparse_layers * experts * linears
    assert not [name for name in names(model) if "router" in name or "lm_head" in name]


def test_scores_depend_on_seed_and_name_not_on_what_else_is_masked():
    def scores(**config):
        return masked_modules(mask_model(llama(), MaskConfig.paper(**config)))["model.layers.1.mlp.up_proj"].scores

    alone = scores(target_modules=["up_proj"], layers_to_transform=1, seed=3)
    torch.manual_seed(99)
    assert torch.equal(alone, scores(seed=3))
    assert not torch.equal(alone, scores(seed=4))
    other = mask_model(llama(), MaskConfig.paper(seed=3)).model.layers[0].mlp.up_proj.scores
    assert not torch.equal(alone, other)


# ---------------------------------------------------------------------------------------------- what is refused


def test_nan_scores_name_the_layer_and_leave_the_model_masked():
    model = mask_model(llama(), MaskConfig())
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.scores[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"model\.layers\.2\.mlp\.up_proj"):
        merge_model(model)
    assert len(names(model)) == 21


# ---------------------------------------------------------------------------------------------- state around it


def test_merging_makes_trainable_again_what_was_trainable_before():
    model = llama()
    model.model.embed_tokens.requires_grad_(False)
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    merge_model(mask_model(model, MaskConfig()))
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before


def test_training_mode_dtype_and_name_carry_over():
    model = mask_model(llama().to(torch.bfloat16).eval(), MaskConfig.paper())
    module = model.model.layers[1].mlp.up_proj
    assert not module.training
    assert module.module_name == "model.layers.1.mlp.up_proj"
    assert (module.weight.dtype, module.scores.dtype) == (torch.bfloat16, torch.float32)
    merge_model(model.train())
    assert model.model.layers[1].mlp.up_proj.training
    assert model.model.layers[1].mlp.up_proj.weight.dtype == torch.bfloat16


def test_a_masked_model_copies_and_pickles(tokens):
    model = mask_model(gpt2().eval(), MaskConfig.paper(layers_to_transform=[1]))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(tokens).logits, model(tokens).logits)
        assert type(merge_model(other).transformer.h[1].mlp.c_fc) is Conv1D
    assert isinstance(model.transformer.h[1].mlp.c_fc, MaskedLinear)


def test_what_is_trained_is_counted_and_what_is_kept_is_said(capsys):
    model = mask_model(llama(), MaskConfig(target_modules=["up_proj"], layers_to_transform=0))
    total = sum(p.numel() for p in model.parameters())
    assert trainable_parameters(model) == (32 * 48, total)
    print_trainable_parameters(model)
    print_trainable_parameters(mask_model(llama(), MaskConfig(modules_to_save=["norm"])))
    one, _, both, _ = capsys.readouterr().out.splitlines()
    assert one.startswith("trained: 1,536 scores, one per weight of 1 masked layer ")
    assert both.endswith(" MB in memory), and 32 weights of modules_to_save")
