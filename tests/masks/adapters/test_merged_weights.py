"""merged_weights yields the merged model's tensors one at a time, bit for bit, and leaves its model unchanged."""

import copy
import weakref
from functools import partial

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft_masks import STILL_CALLED, assert_same, config, layers, with_masks
from tiny import make_llama, masked_llama
from tiny_architectures import MODELS, state
from tiny_mixtures import mixture
from torch import nn
from transformers import LlamaConfig, LlamaForSequenceClassification

from mft import MaskConfig, mask_model, masked_modules, merge_model, merged_weights, quantize_model
from mft_kernels import MaskedLinear

pytestmark = STILL_CALLED


def bfloat16():
    return make_llama(torch.bfloat16)


def tied():
    return make_llama(tie_word_embeddings=True)


BASES = {name: MODELS[name][0] for name in ("gpt2", "opt")} | {"bf16": bfloat16, "tied": tied}  # with Conv1D, biases
BASES |= {kind: partial(mixture, kind) for kind in ("Olmoe", "GptOss")}


def damaged(base):
    """Set weights that a product with the mask would change: NaN, infinity, -0.0."""
    with torch.no_grad():
        for module in base.modules():
            if isinstance(module, nn.Linear) and module is not base.get_output_embeddings():
                module.weight[0, :3] = torch.tensor([float("nan"), float("inf"), -0.0])
    return base


def expected(merged):
    """Return the tensors that an engine knows: parameters, tied ones once, and the buffers that a file would hold."""
    saved = merged.state_dict()
    return {name: p.detach() for name, p in merged.named_parameters()} | {
        name: tensor for name, tensor in merged.named_buffers() if name in saved
    }


@pytest.mark.parametrize("make", BASES.values(), ids=BASES)
def test_they_are_the_merged_model_s_bit_for_bit(make):
    base = damaged(make())
    setting = {"keep_ratio": 0.7, "init": "normal"}
    masked = mask_model(copy.deepcopy(base), MaskConfig(**setting))
    adapted = get_peft_model(copy.deepcopy(base), config(layers_to_transform=None, **setting))
    before, before_adapted = state(masked), state(adapted)
    found, of_peft = dict(merged_weights(masked)), dict(merged_weights(adapted))
    assert_same(state(masked), before)
    assert_same(state(adapted), before_adapted)
    wanted = expected(merge_model(masked))
    assert list(found) == list(wanted)
    assert_same(found, wanted)
    assert_same(of_peft, wanted)
    names = [
        name
        for name, tensor in base.named_parameters()
        if not torch.equal(tensor.nan_to_num(), wanted[name].nan_to_num())
    ]
    assert len(names) > 8  # the masks drop weights of each


def test_one_merged_weight_at_a_time_lies_beside_the_model():
    model = masked_llama()
    own = {tensor.data_ptr() for tensor in model.state_dict().values()}
    before, made = None, 0
    for name, tensor in merged_weights(model):
        assert before is None or before() is None, name
        if tensor.data_ptr() in own:
            before = None
        else:
            before, made = weakref.ref(tensor), made + 1
        del tensor
    assert made == len(masked_modules(model))


def test_buffers_that_a_file_holds_are_among_them():
    model = masked_llama()
    model.model.layers[0].register_buffer("bias_of_experts", torch.ones(2))
    model.model.layers[0].register_buffer("not_saved", torch.ones(2), persistent=False)
    found = dict(merged_weights(model))
    assert "model.layers.0.bias_of_experts" in found
    assert "model.layers.0.not_saved" not in found
    assert_same(found, expected(merge_model(model)))


def test_a_layer_that_stands_in_two_places_is_given_once():
    block = nn.ModuleDict({"first": MaskedLinear(4, 4), "again": nn.Linear(4, 4)})
    block["again"] = block["first"]
    assert list(dict(merged_weights(block))) == ["first.weight", "first.bias"]


def test_under_peft_they_are_what_a_call_computes_with():
    """Test a merged mask, a mask that is switched off, and layers without an active mask."""
    model, base = with_masks(), {name: p.detach() for name, p in make_llama().named_parameters()}
    wanted = dict(merged_weights(model))
    model.merge_adapter()
    assert_same(dict(merged_weights(model)), wanted)
    model.unmerge_adapter()
    with model.disable_adapter():
        assert_same(dict(merged_weights(model)), base)
    model.add_adapter("other", config(layers_to_transform=[0], seed=3))
    model.set_adapter("other")
    changed = [name for name, tensor in merged_weights(model) if not torch.equal(tensor, base[name])]
    assert changed
    assert all(name.startswith("model.layers.0.") for name in changed)


def test_modules_to_save_are_those_of_the_active_adapter():
    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    base = LlamaForSequenceClassification(LlamaConfig(**sizes, num_attention_heads=4, num_labels=3))
    settings = {"layers_to_transform": None, "modules_to_save": ["score"], "task_type": "SEQ_CLS"}
    model = get_peft_model(base, config(**settings))
    with torch.no_grad():
        model.base_model.model.score.modules_to_save["default"].weight.fill_(7)
    found = dict(merged_weights(model))
    assert found["score.weight"].eq(7).all()
    with model.disable_adapter():
        assert not dict(merged_weights(model))["score.weight"].eq(7).any()
    assert_same(found, expected(model.merge_and_unload()))


@pytest.mark.parametrize("kind", ["ours", "peft"])
def test_scores_that_are_not_finite_are_refused_before_the_first_tensor(kind):
    model = masked_llama() if kind == "ours" else with_masks()
    last = (
        list(masked_modules(model).values())[-1].scores if kind == "ours" else layers(model)[-1].mft_scores["default"]
    )
    with torch.no_grad():
        last[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"model\.layers\.3\.mlp\.down_proj.* must be finite"):
        merged_weights(model)


REFUSED = {
    "no mask": (make_llama, "no masked layers to merge, got a plain LlamaForCausalLM"),
    "LoRA": (
        lambda: get_peft_model(make_llama(), LoraConfig(target_modules=["q_proj"])),
        "must have masks to merge, got a PeftModel of LORA: use merge_adapter",
    ),
    "quantised": (lambda: quantize_model(masked_llama(), "int8", masked=True), "must be merged into exact weights"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_merged_is_refused(kind):
    make, message = REFUSED[kind]
    with pytest.raises(ValueError, match=message):
        merged_weights(make())


def test_of_a_compiled_model_they_have_the_names_of_the_model_within():
    model = masked_llama()
    assert list(dict(merged_weights(torch.compile(model, backend="eager")))) == list(dict(merged_weights(model)))
