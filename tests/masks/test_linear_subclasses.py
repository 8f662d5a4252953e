"""Linear layers of other classes, such as Falcon's, with masks, merging, exports, banks, PEFT and quantisation."""

import copy

import pytest
import torch
from tiny_architectures import llama, names, state
from torch import nn
from transformers import FalconConfig, FalconForCausalLM
from transformers.models.falcon.modeling_falcon import FalconLinear

from mft.config import MaskConfig
from mft.masks.bank import load_mask_bank
from mft.masks.convert import mask_model, masked_modules, merge_model
from mft.masks.export import load_masks, save_masks
from mft.masks.merged_weights import merged_weights
from mft.masks.quantize import QuantizedLinear, quantize_model

HALF = MaskConfig.paper(keep_ratio=0.5)
IDS = torch.arange(9)[None]


@pytest.fixture(scope="module")
def falcon():
    config = FalconConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, bias=True)
    return FalconForCausalLM(config).eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def test_falcons_own_linears_are_masked_merged_and_given_back(falcon):
    model = mask_model(copy.deepcopy(falcon), HALF)
    parts = ("self_attention.query_key_value", "self_attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
    assert names(model) == [f"transformer.h.{layer}.{part}" for layer in range(2) for part in parts]
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(module.scores.grad.any() for module in masked_modules(model).values())
    expected = state(falcon)
    for name, module in masked_modules(model).items():
        expected[f"{name}.weight"].masked_fill_(~module.mask(), 0)
    y, given = logits(model), dict(merged_weights(model))
    merge_model(model)
    assert [type(module) for module in model.modules()] == [type(module) for module in falcon.modules()]
    assert [name for name, _ in model.named_parameters()] == list(given)
    for name, tensor in state(model).items():
        assert torch.equal(tensor, expected[name]), name
        assert name not in given or torch.equal(tensor, given[name]), name
    torch.testing.assert_close(logits(model), y)


def test_keeping_everything_is_falcon_again_bit_for_bit(falcon):
    model = mask_model(copy.deepcopy(falcon), MaskConfig(keep_ratio=1.0))
    torch.testing.assert_close(logits(model), logits(falcon))
    assert torch.equal(logits(merge_model(model)), logits(falcon))


def test_exports_banks_and_quantised_bases_take_them(falcon, tmp_path):
    model = mask_model(copy.deepcopy(falcon), HALF)
    y = logits(model)
    save_masks(model, tmp_path)
    assert torch.equal(logits(load_masks(copy.deepcopy(falcon), tmp_path)), y)
    bank = load_mask_bank(copy.deepcopy(falcon), {"task": tmp_path})
    with bank.use("task"):
        assert torch.equal(logits(bank.model), y)
    frozen = copy.deepcopy(falcon).requires_grad_(False)
    quantized = quantize_model(frozen, "int8")
    assert type(quantized.transformer.h[0].mlp.dense_h_to_4h) is QuantizedLinear
    torch.testing.assert_close(logits(quantized), logits(falcon), atol=0.02, rtol=0.1)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated and will be removed:FutureWarning")
def test_peft_masks_and_merges_them_as_we_do(falcon):
    peft = pytest.importorskip("peft")
    from mft.masks.peft import MaskPeftConfig

    expected = mask_model(copy.deepcopy(falcon), HALF)
    model = peft.get_peft_model(copy.deepcopy(falcon), MaskPeftConfig(**vars(HALF)))
    assert torch.equal(logits(model), logits(expected))
    merged = model.merge_and_unload()
    assert type(merged.transformer.h[0].mlp.dense_h_to_4h) is FalconLinear
    merge_model(expected)
    assert all(torch.equal(tensor, state(expected)[name]) for name, tensor in state(merged).items())


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
