"""A model with masks in place: what it contains, what it saves, and that it is restored bit for bit."""

import copy

import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import make_gpt2, make_llama, make_rows, masked_llama
from tiny_mixtures import IDS, KINDS, mixture
from torch import nn

from mft.config import MaskConfig
from mft.evaluation.evaluate import evaluate
from mft.masks.convert import mask_model, masked_modules
from mft.masks.export import base_hash, save_masks
from mft.masks.in_place import layer as layer_module
from mft.masks.in_place.model import MasksInPlace, masks_in_place
from mft.masks.in_place.others_memory import layers_to_copy
from mft.masks.quantize import quantize_model
from mft.masks.unmasked import unmasked_model
from mft.objectives.kl import KL
from mft_kernels import MaskedGroupedLinear, MaskedLinear

TOKENS = torch.arange(12).unsqueeze(0)


def bits(state):
    """Return the bits of a state_dict, whatever the values are."""
    return {name: tensor.detach().contiguous().view(torch.uint8).clone() for name, tensor in state.items()}


def assert_same_bits(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def attention():
    torch.manual_seed(0)
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(16, 2)})
    return mask_model(model, MaskConfig.paper(target_modules=["in_proj", "out_proj"]))


def not_numbers():
    model = masked_llama()
    for module in masked_modules(model).values():
        module.weight.data.view(-1)[:4] = torch.tensor([torch.nan, -torch.inf, -0.0, 0.0])
    return model


MODELS = {
    "llama": masked_llama,
    "not numbers": not_numbers,
    "bfloat16": lambda: masked_llama(dtype=torch.bfloat16),
    "a threshold": lambda: masked_llama(threshold=0.01),
    "int16 scores": lambda: masked_llama(scores_dtype="int16"),
    "gpt2": lambda: mask_model(make_gpt2(), MaskConfig.paper()),
    "attention": attention,
}


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_layers_are_ordinary_meanwhile_and_the_model_comes_back(make):
    model = make()
    masked = masked_modules(model)
    weights = {name: module.weight.clone() for name, module in masked.items()}
    before, whole = bits(model.state_dict()), base_hash(model)
    held = MasksInPlace(model)
    assert masks_in_place(model) is held
    for name, module in masked.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        assert layer.weight.requires_grad
        masked_weight = torch.where(module.mask(), weights[name], 0)
        assert torch.equal(layer.weight.view(torch.uint8), masked_weight.view(torch.uint8))
        assert layer.weight.data_ptr() == module.weight.data_ptr()
    assert not any(isinstance(module, MaskedLinear) for module in model.modules())
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {f"{name}.weight" for name in masked}
    assert_same_bits(bits(model.state_dict()), before)
    assert base_hash(model, masked) == whole
    held.close()
    assert masked_modules(model) == masked
    assert_same_bits(bits(model.state_dict()), before)


def test_it_computes_as_the_masked_model():
    model = masked_llama(layers=(0, 1, 2, 3)).train()
    with torch.no_grad():
        before = model(TOKENS).logits
        held = MasksInPlace(model)
        inside = model(TOKENS).logits
        with held.use_whole_weights():
            base = model(TOKENS).logits
        again = model(TOKENS).logits
        held.close()
        dense = make_llama().train()(TOKENS).logits
    assert torch.allclose(inside, before, atol=1e-5)
    assert torch.allclose(base, dense, atol=1e-5)
    assert torch.equal(again, inside)
    assert not torch.allclose(inside, base, atol=1e-5)


def test_masks_are_saved_meanwhile_as_they_are_outside(tmp_path):
    model = masked_llama()
    outside = save_masks(model, tmp_path / "outside")
    held = MasksInPlace(model)
    weights = bits(dict(model.named_parameters()))
    inside = save_masks(model, tmp_path / "inside")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (inside / name).read_bytes() == (outside / name).read_bytes()
    assert_same_bits(bits(dict(model.named_parameters())), weights)
    held.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_few_tokens_go_through_our_product_and_agree(dtype, monkeypatch):
    model = masked_llama().to(dtype)
    masked = masked_modules(model)
    held, calls = MasksInPlace(model), []
    few = layer_module.try_linear
    monkeypatch.setattr(layer_module, "try_linear", lambda *given: calls.append(few(*given)) or calls[-1])
    layer = model.get_submodule(next(iter(masked)))
    x = torch.randn(2, 8, layer.in_features, dtype=dtype)
    expected = torch.nn.functional.linear(x, layer.weight)
    assert torch.equal(layer(x), expected)  # a gradient may be needed: torch's product
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected)
        layer(torch.cat((x, x)))
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x.float()).dtype == torch.bfloat16
    held.close()
    assert len(calls) == 1
    assert calls[0] is not None


def test_a_part_of_the_model_saves_its_base_too():
    model = masked_llama()
    before = bits(model.model.layers[3].mlp.state_dict())
    held = MasksInPlace(model)
    assert_same_bits(bits(model.model.layers[3].mlp.state_dict()), before)
    assert_same_bits(bits(copy.deepcopy(model).model.layers[3].mlp.state_dict()), before)
    held.close()


def test_evaluation_knows_the_masked_model_and_its_base():
    model, rows = masked_llama(layers=(0, 1, 2, 3)), make_rows()
    outside = evaluate(model, rows, objective=KL())
    held = MasksInPlace(model)
    inside = evaluate(model, rows, objective=KL())
    held.close()
    assert inside.loss == pytest.approx(outside.loss, abs=1e-5)
    assert inside.figures == pytest.approx(outside.figures, abs=1e-5)
    assert outside.figures["kl"] > 1e-4


def test_training_mode_of_meanwhile_stays():
    model = masked_llama()
    held = MasksInPlace(model)
    model.train()
    held.close()
    assert all(module.training for module in masked_modules(model).values())


@pytest.mark.parametrize("kind", KINDS)
def test_experts_are_the_parameters_that_they_were(kind):
    model = mixture(kind)
    parameters, classes = [name for name, _ in model.named_parameters()], [type(module) for module in model.modules()]
    mask_model(model, MaskConfig.paper(keep_ratio=0.7))
    masked = masked_modules(model)
    assert any(isinstance(module, MaskedGroupedLinear) for module in masked.values())
    before, whole = bits(model.state_dict()), base_hash(model)
    with torch.no_grad():
        expected = model(input_ids=IDS, use_cache=False).logits
        held = MasksInPlace(model)
        found = model(input_ids=IDS, use_cache=False).logits
    assert sorted(name for name, _ in model.named_parameters()) == sorted(parameters)
    assert all(isinstance(module, own) for module, own in zip(model.modules(), classes, strict=True))
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert_same_bits(bits(model.state_dict()), before)
    assert base_hash(model, masked) == whole
    held.close()
    assert masked_modules(model) == masked
    assert_same_bits(bits(model.state_dict()), before)


# ---------------------------------------------------------------------------------------------- memory of others


def tied(model, tmp_path):
    model.also = nn.Linear(1, 1)
    model.also.weight = model.model.layers[2].mlp.up_proj.weight


def part_of_another(model, tmp_path):
    model.register_buffer("rows", model.model.layers[2].mlp.up_proj.weight.detach()[3:5])


def mapped(model, tmp_path):
    weight = model.model.layers[2].mlp.up_proj.weight
    save_file({"weight": torch.randn(256, 256)}, tmp_path / "file")  # large enough to be mapped
    weight.data = load_file(tmp_path / "file")["weight"][: weight.shape[0], : weight.shape[1]]


def mapped_for_writing(model, tmp_path):
    weight = model.model.layers[2].mlp.up_proj.weight
    numbers = numpy.memmap(tmp_path / "file", dtype=numpy.float32, mode="w+", shape=tuple(weight.shape))
    numbers[:] = 0.1
    weight.data = torch.from_numpy(numbers)


def of_processes(model, tmp_path):
    weight = model.model.layers[2].mlp.up_proj.weight
    weight.data = weight.data.clone().share_memory_()


OTHERS = [tied, part_of_another, mapped, mapped_for_writing, of_processes]


@pytest.mark.parametrize("other", OTHERS, ids=lambda each: each.__name__)
def test_memory_of_others_is_copied_before_it_is_written(other, tmp_path):
    model = masked_llama()
    assert layers_to_copy(model, masked_modules(model)) == set()
    other(model, tmp_path)
    assert layers_to_copy(model, masked_modules(model)) == {"model.layers.2.mlp.up_proj"}
    weight = model.model.layers[2].mlp.up_proj.weight
    before, file = weight.clone(), (tmp_path / "file").read_bytes() if (tmp_path / "file").exists() else b""
    saved = bits(model.state_dict())
    held = MasksInPlace(model)
    assert torch.equal(weight, before)
    assert (model.model.layers[2].mlp.up_proj.weight == 0).any()
    assert_same_bits(bits(model.state_dict()), saved)
    held.close()
    assert torch.equal(weight, before)
    assert not file or (tmp_path / "file").read_bytes() == file


def test_a_reference_on_the_same_memory_keeps_the_base():
    model = masked_llama()
    reference = unmasked_model(model)
    with torch.no_grad():
        before = reference(TOKENS).logits
        held = MasksInPlace(model)
        assert torch.equal(reference(TOKENS).logits, before)
        held.close()


# ---------------------------------------------------------------------------------------------- what is refused


def quantised():
    return quantize_model(masked_llama(), "int8", masked=True)


def hooked():
    model = masked_llama()
    model.model.layers[2].mlp.up_proj.register_forward_hook(lambda *_: None)
    return model


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (hooked, "model.layers.2.mlp.up_proj must have no hooks of its own"),
    ],
)
def test_what_cannot_be_in_place_is_left_alone(make, words):
    model = make()
    before = bits(model.state_dict())
    with pytest.raises(ValueError, match=words):
        MasksInPlace(model)
    assert masks_in_place(model) is None
    assert_same_bits(bits(model.state_dict()), before)


def test_functions_of_masked_models_refuse_it_meanwhile():
    model = masked_llama()
    held = MasksInPlace(model)
    for function in (masked_modules, MasksInPlace, unmasked_model, lambda m: mask_model(m, MaskConfig.paper())):
        with pytest.raises(RuntimeError, match="model must not have its masks in place here, got a LlamaForCausalLM"):
            function(model)
    with pytest.raises(RuntimeError, match="state_dict must be loaded before masks are in place"):
        model.load_state_dict(model.state_dict())
    held.close()


def assigned(weight, place, value):
    weight[place] = value


WRITES = {
    "added to": lambda weight: weight.add_(1),
    "swapped in a row": lambda weight: assigned(weight, (3, [5, 8]), weight[3, [8, 5]]),
    "swapped in a column": lambda weight: assigned(weight, ([3, 6], 5), weight[[6, 3], 5]),
    "rows swapped": lambda weight: assigned(weight, [3, 6], weight[[6, 3]]),
    "two negated": lambda weight: assigned(weight, (3, [5, 8]), -weight[3, [5, 8]]),
    "all negated": lambda weight: weight.neg_(),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float64)


# Each write in one dtype: it is seen in the bits, whatever they stand for.
@pytest.mark.parametrize(("write", "dtype"), zip(WRITES.values(), DTYPES * 2, strict=True), ids=list(WRITES))
def test_who_writes_the_weights_is_found_out(write, dtype):
    model = mask_model(make_llama(dtype), MaskConfig.paper(layers_to_transform=[2, 3], keep_ratio=1.0))
    held = MasksInPlace(model)
    write(model.model.layers[2].mlp.up_proj.weight.data)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"of model.layers.2.mlp.up_proj must not be written while masks"):
            held.close()
    assert len(masked_modules(model)) == 14
