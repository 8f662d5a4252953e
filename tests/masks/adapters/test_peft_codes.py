"""Masks under PEFT on a 4-bit base, as transformers loads it with bitsandbytes, and on our own codes."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from peft_masks import STILL_CALLED, config
from tiny import TOKENS, logits, make_llama
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from mft import quantize_model
from mft.masks.peft import to_masked_model
from mft.masks.peft_layers.quantized_layer import MaskCodes
from mft.models.codes.quantized_linears import codes_of, holds_codes

pytestmark = [
    STILL_CALLED,
    pytest.mark.filterwarnings("ignore:.*use_reentrant parameter should be passed:UserWarning"),  # PEFT omits it
]
CODES = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
SIZES = {"hidden_size": 64, "intermediate_size": 128}  # bitsandbytes on a CPU needs whole blocks of 64
LAYERS = {"layers_to_transform": None}
KINDS = ("nf4", "nf4-dq", "int8", "bitsandbytes", "bitsandbytes-dq")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("base")
    make_llama(**SIZES).save_pretrained(path)
    return path


def coded_base(kind, directory, dtype=torch.float32):
    if not kind.startswith("bitsandbytes"):
        return quantize_model(make_llama(**SIZES).to(dtype).requires_grad_(False), kind).eval()
    settings = BitsAndBytesConfig(**CODES, bnb_4bit_use_double_quant=kind.endswith("-dq"), bnb_4bit_compute_dtype=dtype)
    return AutoModelForCausalLM.from_pretrained(
        directory, quantization_config=settings, dtype=dtype, device_map="cpu"
    ).eval()


def as_dense(model):
    """Return the same model with dense weights."""
    dense = copy.deepcopy(model)
    for name, module in list(dense.named_modules()):
        if holds_codes(module):
            weight, bias = codes_of(module).dense(), module.bias
            linear = nn.Linear(*weight.shape[::-1], bias=bias is not None, dtype=weight.dtype)
            linear.weight.data = weight
            if bias is not None:
                linear.bias.data = bias.data
            dense.set_submodule(name, linear.requires_grad_(False))
    return dense


def coded_layers(model):
    return [module for module in model.modules() if isinstance(module, MaskCodes)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_coded_base_learns_as_its_decoded_weights_do(kind, dtype, directory):
    base = coded_base(kind, directory, dtype)
    dense = get_peft_model(as_dense(base), config(**LAYERS))
    model = get_peft_model(base, config(**LAYERS))
    assert len(coded_layers(model)) == 28
    found, expected = (m.train()(input_ids=TOKENS, labels=TOKENS) for m in (model, dense))
    close = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.1, "atol": 0.02}
    torch.testing.assert_close(found.logits, expected.logits, **close)
    found.loss.backward()
    expected.loss.backward()
    gradients = [[p.grad for p in m.parameters() if p.requires_grad] for m in (model, dense)]
    assert len(gradients[0]) == 28
    for mine, theirs in zip(*gradients):
        error, size = (mine - theirs).norm(), theirs.norm()
        assert size > 0
        assert error <= (1e-4 if dtype == torch.float32 else 0.1) * size
    model.eval(), dense.eval()
    with model.disable_adapter(), dense.disable_adapter():
        torch.testing.assert_close(logits(model), logits(dense), **close)


@pytest.mark.parametrize("kind", KINDS)
def test_a_mask_merges_into_codes_and_leaves_them_again(kind, directory):
    model = get_peft_model(coded_base(kind, directory), config(**LAYERS)).eval()
    before = [codes_of(layer.base_layer).dense() for layer in coded_layers(model)]
    expected = logits(model)
    model.merge_adapter(safe_merge=True)
    for layer, dense in zip(coded_layers(model), before):
        keep = layer.keep("default", "weight", dense.shape)
        assert torch.equal(codes_of(layer.base_layer).dense(), torch.where(keep, dense, 0))
        assert not keep.all()
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-6)
    model.unmerge_adapter()
    for layer, dense in zip(coded_layers(model), before):
        assert torch.equal(codes_of(layer.base_layer).dense(), dense)
    assert torch.equal(logits(model), expected)
    merged = model.merge_and_unload()
    assert not any(isinstance(module, MaskCodes) for module in merged.modules())
    torch.testing.assert_close(logits(as_dense(merged)), expected, rtol=1e-4, atol=1e-5)


def test_scores_learned_on_codes_are_exported_on_the_exact_base(directory, tmp_path):
    model = get_peft_model(coded_base("bitsandbytes-dq", directory), config(**LAYERS))
    keeps = {
        layer.module_name: layer.keep("default", "weight", layer.shapes_of(["default"])["weight"])
        for layer in coded_layers(model)
    }
    with pytest.raises(ValueError, match=r"masks must lie on exact weights to be exported, got \S+ over codes: save_p"):
        to_masked_model(model)
    model.save_pretrained(tmp_path)
    masked = to_masked_model(PeftModel.from_pretrained(make_llama(**SIZES), tmp_path))
    assert all(torch.equal(masked.get_submodule(name).mask(), keep) for name, keep in keeps.items())


def test_qlora_s_preparation_and_rows_with_masks_of_their_own(directory):
    base = prepare_model_for_kbit_training(coded_base("bitsandbytes", directory, torch.bfloat16))
    model = get_peft_model(base, config(**LAYERS))
    model.add_adapter("other", config(layers_to_transform=None, keep_ratio=0.5, seed=1))
    model.train()(input_ids=TOKENS, labels=TOKENS).loss.backward()
    assert all(p.grad.count_nonzero() for name, p in model.named_parameters() if p.requires_grad)
    model.eval()
    with torch.no_grad():
        mixed = model(input_ids=TOKENS, adapter_names=["default", "other", "__base__"]).logits
    for row, name in enumerate(["default", "other"]):
        model.set_adapter(name)
        torch.testing.assert_close(mixed[row], logits(model)[row], rtol=0.1, atol=0.05)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"load_in_4bit": True},
            "its codes are fp4 in blocks of 64, not nf4 in blocks of 64: load it with",
        ),
        ({"load_in_8bit": True}, "it is a Linear8bitLt of bitsandbytes whose weight is not quantised to 4 bits"),
    ],
)
def test_other_codes_are_refused(settings, message, directory):
    base = AutoModelForCausalLM.from_pretrained(
        directory, quantization_config=BitsAndBytesConfig(**settings), device_map="cpu"
    )
    with pytest.raises(ValueError, match=rf"cannot mask model.layers.0.\S+: {message}"):
        get_peft_model(base, config(**LAYERS))
