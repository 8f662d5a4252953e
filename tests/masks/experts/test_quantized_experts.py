"""Experts in one parameter in few bits, frozen and masked: what they compute, their memory, and their reports."""

import copy
import pickle
import weakref

import pytest
import torch
from tiny import TOKENS, logits, normal
from tiny_architectures import MIXTURES

from benchmarks.memory.tracker import MemoryTracker
from mft.config import QUANTIZATIONS, MaskConfig
from mft.masks.base_pass import use_whole_weights
from mft.masks.convert import mask_model, masked_modules
from mft.masks.quantize import QuantizedMaskedGroupedLinear, _quantize_masked, quantize_model
from mft.masks.unmasked import unmasked_model
from mft.models.codes.quantized_experts import QuantizedGroupedLinear, dense_experts
from mft.models.codes.weight import quantized_weights
from mft.models.routed_experts import unmasked_product
from mft_kernels import MaskedGroupedLinear

OFFSETS = torch.tensor([3, 3, 7], dtype=torch.int32)  # the second of three experts has no rows


def mixture(kind="gpt_oss", layers=None, keep_ratio=0.7):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MIXTURES[kind]().eval().requires_grad_(False)
    return model if layers is None else mask_model(model, MaskConfig(layers_to_transform=layers, keep_ratio=keep_ratio))


def dense_in_place(model, quantized):
    """Return model with the weights that the codes of quantized stand for; both are the same model."""
    for name, weight in quantized_weights(quantized).items():
        layer = quantized.get_submodule(name)
        dense = weight.dense() if not hasattr(layer, "experts") else dense_experts(weight, layer.experts)
        part = model.get_parameter(
            name if "experts" in name and name not in masked_modules(model) else f"{name}.weight"
        )
        part.data = dense
    return model


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_frozen_experts_are_the_product_with_their_dense_weight_which_nobody_keeps(kind, transposed):
    weight, bias = normal(3, 40, 24) if transposed else normal(3, 24, 40), normal(3, 24, seed=1)
    layer = QuantizedGroupedLinear.from_weight(weight, bias, transposed=transposed, kind=kind)
    x, other = (normal(7, 40, seed=2).requires_grad_() for _ in range(2))
    dense = dense_experts(layer.quantized, 3)
    assert 0 < (dense - weight).abs().max() < 0.01
    expected = unmasked_product(other, dense, OFFSETS, bias, transposed)
    with MemoryTracker() as tracker:
        y = layer(x, OFFSETS)
        assert tracker.device_bytes < dense.nbytes
    assert torch.equal(y, expected)
    y.backward(normal(7, 24, seed=3))
    expected.backward(normal(7, 24, seed=3))
    assert torch.equal(x.grad, other.grad)


@pytest.mark.parametrize("transposed", [False, True])
def test_masked_experts_that_hold_a_mask_keep_no_dense_weight(transposed):
    weight = normal(3, 40, 24) if transposed else normal(3, 24, 40)
    module = MaskedGroupedLinear(weight, normal(3, 24, seed=1), transposed=transposed, keep_ratio=0.5)
    _quantize_masked(module, "int8")
    exact = MaskedGroupedLinear(module.weight, module.bias, transposed=transposed, keep_ratio=0.5)
    buffers = [torch.zeros(weight.shape) for _ in range(2)]
    for layer, buffer in zip((module, exact), buffers):
        layer.hold(module.packed_mask(), buffer, weight=getattr(layer, "quantized", None))
    x, other = (normal(7, 40, seed=2).requires_grad_() for _ in range(2))
    expected = exact(other, OFFSETS)
    with MemoryTracker() as tracker:
        y = copy.deepcopy(module)(x, OFFSETS)
        assert tracker.device_bytes < 3 * weight.nbytes  # the copy: scores, codes, buffer, but no dense weight
        y = module(x, OFFSETS)
    assert torch.equal(y, expected)
    y.sum().backward()
    expected.sum().backward()
    assert torch.equal(x.grad, other.grad)
    assert torch.equal(*buffers)
    assert not buffers[0][1].any()


@pytest.mark.parametrize("scores_dtype", [torch.float32, torch.bfloat16, torch.int16])
@pytest.mark.parametrize("transposed", [False, True])
def test_without_hold_gradients_are_those_of_the_dense_weight_which_nobody_keeps(transposed, scores_dtype, monkeypatch):
    weight = normal(3, 40, 24) if transposed else normal(3, 24, 40)
    bias = normal(3, 24, seed=1)
    module = MaskedGroupedLinear(weight, bias, transposed=transposed, keep_ratio=0.5, scores_dtype=scores_dtype)
    _quantize_masked(module, "int8")
    module.bias.requires_grad_()
    made, found = [], []

    def dense(*arguments):
        weight = dense_experts(*arguments)
        made.append(weakref.ref(weight))
        return weight

    monkeypatch.setattr("mft.masks.quantize.dense_experts", dense)
    for forward in (QuantizedMaskedGroupedLinear.forward, MaskedGroupedLinear.forward):
        x = normal(7, 40, seed=2).requires_grad_()
        module.scores.grad = module.bias.grad = None
        made.clear()
        y = forward(module, x, OFFSETS)
        found.append(made[0]() is not None)
        y.backward(normal(7, 24, seed=3))
        found.append([y.detach(), x.grad, module.bias.grad, module.scores.grad])
    assert found[::2] == [False, True]
    for ours, theirs in zip(found[1], found[3]):
        assert ours is theirs is None or torch.equal(ours, theirs)
    assert (found[1][-1] is None) == (scores_dtype == torch.int16)


@pytest.mark.parametrize("kind", MIXTURES)
def test_a_models_experts_compute_with_the_levels_nearest_to_their_weights(kind):
    exact = mixture(kind)
    model = quantize_model(copy.deepcopy(exact), "int8")
    names = {f"model.layers.{i}.mlp.experts.{part}_proj" for i in range(3) for part in ("gate_up", "down")}
    assert names < quantized_weights(model).keys()
    routers = [name for name, _ in model.named_parameters() if "router" in name or "mlp.gate" in name]
    assert len(routers) >= 3
    assert all(torch.equal(model.get_parameter(name), exact.get_parameter(name)) for name in routers)
    assert model.num_parameters() < 0.3 * exact.num_parameters()
    found = logits(model)
    assert torch.allclose(found, logits(dense_in_place(copy.deepcopy(exact), model)), atol=1e-5)
    assert not torch.allclose(found, logits(exact), atol=1e-5)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model))), found)


@pytest.mark.parametrize("masked", [False, True])
def test_masks_over_codes_and_the_base_beside_and_within_them(masked):
    exact = mixture(layers=[1, 2])
    model = quantize_model(copy.deepcopy(exact), "int8", masked=masked)
    kinds = [type(layer) for layer in masked_modules(model).values() if isinstance(layer, MaskedGroupedLinear)]
    assert kinds == [QuantizedMaskedGroupedLinear if masked else MaskedGroupedLinear] * 4
    dense = dense_in_place(exact, model)
    assert torch.allclose(logits(model), logits(dense), atol=1e-5)
    base = logits(unmasked_model(dense))
    plain = unmasked_model(model)
    assert torch.allclose(logits(plain), base, atol=1e-5)
    assert not masked_modules(plain)
    assert len(quantized_weights(plain)) == len(quantized_weights(model))
    with use_whole_weights(model):
        assert torch.allclose(logits(model), base, atol=1e-5)
    assert not torch.allclose(logits(model), base, atol=1e-3)


def test_one_of_two_projections_masked_leaves_the_other_to_be_quantised():
    model = mask_model(mixture(), MaskConfig(target_parameters=["experts.down_proj"]))
    quantize_model(model, "int8")
    names = quantized_weights(model).keys()
    assert len([name for name in names if name.endswith("gate_up_proj")]) == 3
    assert not any(name.endswith("down_proj") for name in names)
    masked = masked_modules(model)
    model(input_ids=TOKENS).logits.sum().backward()
    assert all(layer.scores.grad.any() for layer in masked.values())


def test_what_cannot_be_quantised_is_named_and_what_learns_left_alone():
    name = "model.layers.1.mlp.experts.down_proj"
    model = mixture()
    model.get_parameter(name).data[2, 1, 1] = float("nan")
    with pytest.raises(ValueError, match=f"{name}: weight must be finite"):
        quantize_model(model, "int8")
    model = mixture()
    model.get_parameter(name).requires_grad_(True)
    quantize_model(model, "int8")
    experts = [n for n in quantized_weights(model) if "experts" in n]
    assert len(experts) == 4  # a module's projections are trained together or not at all
    assert not any(n.startswith("model.layers.1.") for n in experts)
    model = mixture()
    model.model.layers[0].mlp.experts.forward = lambda *_: None
    with pytest.raises(
        ValueError, match=r"cannot quantise model.layers.0.mlp.experts.gate_up_proj: the forward of its"
    ):
        quantize_model(model, "int8")
