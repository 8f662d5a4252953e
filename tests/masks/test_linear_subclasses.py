"""Linears of other classes: Falcon's, and those in the nn.MultiheadAttention of SigLIP's head."""

import copy
from types import SimpleNamespace

import pytest
import torch
from tiny_architectures import llama, names, state
from torch import nn
from transformers import FalconConfig, FalconForCausalLM, SiglipVisionConfig, SiglipVisionModel

from mft.config import MaskConfig
from mft.masks.bank import load_mask_bank
from mft.masks.convert import mask_model, masked_modules, merge_model
from mft.masks.export import load_masks, save_masks
from mft.masks.merged_weights import merged_weights
from mft.masks.quantize import QuantizedLinear, QuantizedMaskedLinear, quantize_model
from mft.masks.unmasked import unmasked_model

IDS = torch.arange(18).view(2, 9)
IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
SIZES = {"hidden_size": 32, "num_attention_heads": 4}
PARTS = ("self_attention.query_key_value", "self_attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")


def falcon():
    base = FalconForCausalLM(FalconConfig(vocab_size=64, num_hidden_layers=2, bias=True, **SIZES)).eval()
    masked = [f"transformer.h.{layer}.{part}" for layer in range(2) for part in PARTS]
    call = lambda model: model(input_ids=IDS).logits  # noqa: E731
    return SimpleNamespace(base=base, config=MaskConfig.paper(keep_ratio=0.5), masked=masked, call=call)


def siglip():
    """Its pooling head attends from a probe to the patches with nn.MultiheadAttention."""
    config = SiglipVisionConfig(**SIZES, intermediate_size=48, num_hidden_layers=1, image_size=16, patch_size=4)
    masked = ["head.attention.in_proj", "head.attention.out_proj"]
    call = lambda model: model(pixel_values=IMAGES).pooler_output  # noqa: E731
    masks = MaskConfig.paper(target_modules=["in_proj", "head.attention.out_proj"], keep_ratio=0.5)
    return SimpleNamespace(base=SiglipVisionModel(config).eval(), config=masks, masked=masked, call=call)


@pytest.fixture(scope="module", params=[falcon, siglip])
def kind(request):
    return request.param()


def masked(kind):
    return mask_model(copy.deepcopy(kind.base), kind.config)


@torch.no_grad()
def out(kind, model):
    return kind.call(model)


def weight_name(name):
    return f"{name}_weight" if name.endswith("in_proj") else f"{name}.weight"


def test_they_are_masked_by_name_learn_and_merge_to_what_they_were(kind):
    model = masked(kind)
    assert names(model) == kind.masked
    kind.call(model).square().sum().backward()
    assert all(module.scores.grad.any() for module in masked_modules(model).values())
    expected, y, given = state(kind.base), out(kind, model), dict(merged_weights(model))
    for name, module in masked_modules(model).items():
        expected[weight_name(name)].masked_fill_(~module.mask(), 0)
    merge_model(model)
    assert [type(module) for module in model.modules()] == [type(module) for module in kind.base.modules()]
    assert list(given) == [name for name, _ in model.named_parameters()]
    assert list(state(model)) == list(expected)
    for name, tensor in state(model).items():
        assert torch.equal(tensor, expected[name]), name
        assert name not in given or torch.equal(tensor, given[name]), name
    torch.testing.assert_close(out(kind, model), y)


def test_exports_and_banks_take_them_and_a_base_that_differs_there_is_refused(kind, tmp_path):
    model = masked(kind)
    save_masks(model, tmp_path)
    assert torch.equal(out(kind, load_masks(copy.deepcopy(kind.base), tmp_path)), out(kind, model))
    bank = load_mask_bank(copy.deepcopy(kind.base), {"task": tmp_path})
    with bank.use(["task", None]):
        y = out(kind, bank.model)
    torch.testing.assert_close(y, torch.stack([out(kind, model)[0], out(kind, kind.base)[1]]))
    other = copy.deepcopy(kind.base)
    other.get_parameter(weight_name(kind.masked[0])).data[0, 0] += 1
    with pytest.raises(ValueError, match="learned on other weights of the same shapes"):
        load_masks(other, tmp_path)
    assert not masked_modules(other)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated and will be removed:FutureWarning")
def test_peft_masks_and_merges_them_as_we_do(kind):
    peft = pytest.importorskip("peft")
    from mft.masks.peft import MaskPeftConfig, to_masked_model

    expected = masked(kind)
    model = peft.get_peft_model(copy.deepcopy(kind.base), MaskPeftConfig(**vars(kind.config)))
    assert torch.equal(out(kind, model), out(kind, expected))
    given, weights = dict(merged_weights(model)), dict(merged_weights(expected))
    assert list(given) == list(weights)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in given.items())
    assert torch.equal(out(kind, to_masked_model(copy.deepcopy(model))), out(kind, expected))
    merged = model.merge_and_unload()
    assert [type(module) for module in merged.modules()] == [type(module) for module in kind.base.modules()]
    wanted = state(merge_model(expected))
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in state(merged).items())


def test_quantised_and_unmasked_they_compute_their_own(kind):
    model = masked(kind)
    torch.testing.assert_close(out(kind, unmasked_model(model)), out(kind, kind.base))
    y = out(kind, model)
    quantize_model(model, "int8", masked=True)
    assert {type(module) for module in masked_modules(model).values()} == {QuantizedMaskedLinear}
    torch.testing.assert_close(out(kind, model), y, atol=0.05, rtol=0.1)


def test_frozen_linears_of_a_subclass_are_quantised():
    base = falcon().base.requires_grad_(False)
    y = base(IDS).logits
    assert type(quantize_model(base, "int8").transformer.h[0].mlp.dense_h_to_4h) is QuantizedLinear
    torch.testing.assert_close(base(IDS).logits, y, atol=0.02, rtol=0.1)


class Clamped(nn.Linear):
    """A linear layer whose own forward does more."""

    def forward(self, x):
        return super().forward(x).clamp(max=3)


class Remarked(nn.Linear):
    """A linear layer whose own forward computes the same, with a buffer that it does not read."""

    computes_linear = True

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.most = nn.Buffer(torch.tensor(3.0))

    def forward(self, x):
        return super().forward(x)


def test_one_that_may_do_more_is_refused_by_name_and_the_rest_can_be_masked():
    model = llama()
    model.model.layers[1].mlp.up_proj = Clamped(32, 48, bias=False)
    said = r"mask model.layers.1.mlp.up_proj: it is a \S+, not a plain nn.Linear: .* set Clamped.computes_linear = True"
    with pytest.raises(ValueError, match=said):
        mask_model(model, MaskConfig())
    assert len(names(mask_model(model, MaskConfig(exclude_modules=["1.mlp.up_proj"])))) == 20


def test_what_a_layer_holds_beside_its_weight_is_given_back():
    model = llama()
    model.model.layers[1].mlp.up_proj = own = Remarked(32, 48, bias=False)
    own.remark = "kept"
    mask_model(model, MaskConfig(target_modules=["1.mlp.up_proj"]))
    assert "model.layers.1.mlp.up_proj.most" in dict(merged_weights(model))
    merged = merge_model(copy.deepcopy(model)).model.layers[1].mlp.up_proj
    assert (type(merged), merged.remark, merged.most.item()) == (Remarked, "kept", 3.0)
