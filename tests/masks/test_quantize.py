"""Quantised bases: products and gradients, whole models, training, and what an export records about them."""

import copy
import textwrap
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from tiny import frozen_linear, logits, make_gpt2, make_llama, make_rows, masked_llama, normal
from tiny_mixtures import mixture
from torch import nn
from transformers import AutoModelForCausalLM

import mft.config
import mft.engines.mode
from benchmarks.memory.tracker import MemoryTracker
from mft.config import QUANTIZATIONS, MaskConfig, ModelConfig, RunConfig, TrainConfig
from mft.engines.offload import Mover
from mft.evaluation.evaluate import evaluate
from mft.masks.convert import mask_model, masked_modules
from mft.masks.export import base_hash, load_masks, save_masks
from mft.masks.export_format import read_export
from mft.masks.quantize import (
    QuantizedLinear,
    QuantizedMaskedLinear,
    _quantize_masked,
    coded_shapes,
    quantize_model,
    rounded_weights,
)
from mft.models.codes.weight import quantized_weights
from mft.models.linears import find_candidates, layer_stacks, weight_name
from mft.training.loop import train_masks
from mft_kernels import MaskedLinear, masked_linear_packed, pack_mask
from mft_kernels.backends import cpu

GATE = "model.layers.0.mlp.gate_proj"


def all_kept(rows, columns):
    return pack_mask(torch.ones(rows, columns), torch.tensor(1.0))


# ---------------------------------------------------------------------------------------------- one linear


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_forward_and_gradients_are_those_of_the_dense_weight(kind, bias):
    layer = QuantizedLinear.from_linear(frozen_linear(bias=bias), kind)
    x, copied = (normal(2, 7, 40, seed=1).requires_grad_() for _ in range(2))
    y, grad = layer(x), normal(2, 7, 24, seed=2)
    assert torch.allclose(y, F.linear(x, layer.quantized.dense(), layer.bias), atol=1e-6)
    y.backward(grad)
    # Bitwise equal with the same kernels, which sum in a different order from torch's.
    expected = masked_linear_packed(copied, layer.quantized.dense(), all_kept(24, 40), layer.bias)
    expected.backward(grad)
    assert torch.equal(y, expected)
    assert torch.equal(x.grad, copied.grad)
    if bias:
        layer.bias.requires_grad_()
        layer(x).backward(grad)
        assert torch.allclose(layer.bias.grad, grad.sum((0, 1)))
        layer.bias.requires_grad_(False)
    x, grad = normal(513, 40, seed=1).requires_grad_(), normal(513, 24, seed=2)  # torch's product for many tokens
    y = layer(x)
    y.backward(grad)
    assert torch.equal(y, F.linear(x, layer.quantized.dense(), layer.bias))
    assert torch.equal(x.grad, grad @ layer.quantized.dense())


@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_autocast_and_checkpointing_reach_through(kind):
    layer = QuantizedLinear.from_linear(frozen_linear(), kind)
    x = normal(7, 40, seed=1).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
    y.backward(torch.ones_like(y))
    assert (y.dtype, x.grad.dtype) == (torch.bfloat16, torch.float32)
    assert torch.allclose(x.grad, torch.ones(7, 24) @ layer.quantized.dense(), atol=5e-3)


@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_a_product_makes_no_dense_weight_and_keeps_no_x(kind):
    layer = QuantizedLinear.from_linear(frozen_linear(512, 512, bias=False), kind)
    dense_bytes = 4 * 512 * 512
    x = torch.ones(4, 512, requires_grad=True)
    most = dense_bytes / 8 if cpu.unavailable is None else 2 * dense_bytes
    with MemoryTracker() as tracker:
        y = layer(x * 1)
        # The multiplication saves nothing, so only y is left.
        assert tracker.device_bytes == y.nbytes
        assert tracker.device_peak < most
        tracker.reset_peaks()
        y.backward(torch.ones_like(y))
        assert tracker.device_peak < most
    assert tracker.device_bytes < dense_bytes / 8


# ---------------------------------------------------------------------------------------------- whole models


@pytest.mark.parametrize("kind", QUANTIZATIONS)
@pytest.mark.parametrize("make", ["llama", "gpt2", "GptOss"])
def test_rounded_weights_are_to_the_bit_those_of_the_codes_and_the_model_computes_with_them(make, kind):
    """For linears, for Conv1D with its transposed weight (also a square one), and for experts, some transposed."""
    makers = {"llama": lambda: make_llama(torch.bfloat16), "gpt2": lambda: make_gpt2(n_embd=48)}
    model = makers.get(make, lambda: mixture(make))().requires_grad_(False)
    before = {name: p.clone() for name, p in model.named_parameters()}
    rounded, shapes = rounded_weights(model, kind), coded_shapes(model)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    coded = quantize_model(copy.deepcopy(model), kind)
    quantized = quantized_weights(coded)
    assert len(quantized) == len(rounded) == len(shapes)
    for name, weight in quantized.items():
        own_name = weight_name(model, name)
        found = rounded[own_name]
        assert shapes[own_name] == weight.shape
        assert (found.shape, found.dtype) == (before[own_name].shape, before[own_name].dtype)
        dense = weight.dense()
        if make == "gpt2":
            dense = dense.t()
        assert torch.equal(found, dense.view(found.shape) if found.dim() == 3 else dense)
        assert not torch.equal(found, before[own_name])
    exact, ours = logits(model), logits(coded)
    for name, weight in rounded.items():
        model.get_parameter(name).copy_(weight)
    near = 2e-2 if make == "llama" else 1e-5  # bfloat16 rounds each product
    assert (ours - logits(model)).abs().max() <= near * exact.abs().max()
    assert not torch.equal(ours, exact)


@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_the_decoders_linears_are_quantised_and_nothing_else(kind):
    model = make_llama(tie_word_embeddings=False).requires_grad_(False)
    before = {name: p.clone() for name, p in model.named_parameters()}
    assert quantize_model(model, kind) is model
    linears = {name for name in before if name.endswith("_proj.weight")}
    assert {f"{name}.weight" for name in quantized_weights(model)} == linears
    assert len(linears) == 4 * 7
    after = dict(model.named_parameters())
    assert after.keys() == before.keys() - linears
    assert all(torch.equal(after[name], before[name]) for name in after)


@pytest.mark.parametrize("masked", [False, True])
def test_masked_layers_are_quantised_on_request(masked):
    model = masked_llama()
    names, scores = list(masked_modules(model)), [m.scores for m in masked_modules(model).values()]
    exact = {name: module.weight.clone() for name, module in masked_modules(model).items()}
    quantize_model(model, masked=masked)
    found = masked_modules(model)
    assert list(found) == names
    assert len(quantized_weights(model)) == 4 * 7 if masked else 2 * 7
    for name, before in zip(names, scores):
        module = found[name]
        assert module.scores is before
        assert isinstance(module, QuantizedMaskedLinear) == masked
        assert torch.equal(module.weight, exact[name]) != masked
        x = normal(3, module.in_features, seed=3)
        expected = F.linear(x, torch.where(module.mask(), module.weight, 0), module.bias)
        assert torch.allclose(module(x), expected, atol=1e-6)
        assert "weight" not in dict(module.named_parameters()) or not masked


def test_quantised_linears_are_linears_to_the_search_and_cannot_be_masked():
    model = quantize_model(make_llama().requires_grad_(False))
    candidates = [c for c in find_candidates(model, layer_stacks(model)) if not c.is_head]
    assert len(candidates) == 4 * 7
    with pytest.raises(ValueError, match="cannot mask .*: it is a mft.masks.quantize.QuantizedLinear, not a plain"):
        mask_model(model, MaskConfig.paper())


def test_a_trainable_linear_is_left_alone():
    model = make_llama().requires_grad_(False)
    model.get_submodule(GATE).weight.requires_grad_(True)
    quantize_model(model)
    assert type(model.get_submodule(GATE)) is nn.Linear
    assert len(quantized_weights(model)) == 4 * 7 - 1


def test_what_cannot_be_quantised_is_refused_and_left_as_it_was():
    model = make_llama()
    with pytest.raises(ValueError, match="frozen linears in its decoder layers to quantise, got 28 that are trainable"):
        quantize_model(model)
    model.requires_grad_(False).get_submodule(GATE).register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=f"cannot quantise {GATE}: it has hooks"):
        quantize_model(model)
    with pytest.raises(ValueError, match="kind must be one of nf4, nf4-dq, int8, got 'int4'"):
        quantize_model(model, "int4")
    with pytest.raises(ValueError, match="must have linears in decoder layers to quantise, got Sequential without any"):
        quantize_model(nn.Sequential(frozen_linear()))
    assert not quantized_weights(model)


# ---------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("masked", [False, True], ids=["one memory", "masked layers too, two memories"])
@pytest.mark.parametrize("way", ["resident", "quantized", "layerwise"])
def test_every_way_gives_the_plain_update_on_a_quantised_base(way, masked, monkeypatch):
    monkeypatch.setattr(mft.engines.mode, "Mover", lambda device: Mover(device, separate=masked))
    settings = TrainConfig(lr=1e-3, steps=3, batch_size=2, accumulation=2)
    runs = []
    for name in ("plain", way):
        model = quantize_model(masked_llama(layers=(1, 3)), masked=masked)
        start = {name: module.scores.detach().clone() for name, module in masked_modules(model).items()}
        reports = train_masks(model, make_rows(), settings, way=name)
        runs.append((model, [report.loss for report in reports]))
    (plain, plain_losses), (ours, losses) = runs
    assert losses == pytest.approx(plain_losses, abs=1e-6)
    for name, module in masked_modules(ours).items():
        expected = masked_modules(plain)[name].scores
        assert (module.scores - expected).abs().max() <= 1e-6, name
        assert (expected - start[name]).abs().max() > 1e-3, name


@pytest.mark.parametrize("fused", [False, True])
def test_a_held_mask_makes_the_weight_anew_in_each_pass_or_not_at_all(fused):
    model = quantize_model(masked_llama(layers=(3,)), masked=True)
    module = next(iter(masked_modules(model).values()))
    dense_bytes = 4 * module.quantized.shape.numel()
    buffer = torch.zeros(module.quantized.shape)
    module.hold(module.packed_mask(), buffer, weight=module.quantized if fused else module.quantized.dense)
    x = torch.ones(3, module.in_features, requires_grad=True)
    with MemoryTracker() as tracker:
        y = module(x)
        assert tracker.device_bytes < dense_bytes
        y.sum().backward()
    assert torch.equal(buffer, torch.full_like(buffer, 3))
    assert torch.allclose(x.grad, torch.where(module.mask(), module.weight, 0).sum(0).expand_as(x), atol=1e-6)


@pytest.mark.parametrize("mode", ["magnitude", "value"])
@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_gradients_without_hold_are_those_of_the_dense_weight(kind, mode):
    module = MaskedLinear.from_linear(frozen_linear(70, 640), mode=mode, keep_ratio=0.5)
    module.bias.requires_grad_()
    _quantize_masked(module, kind)

    def gradients(product):
        x = normal(20, 640, seed=1).requires_grad_()
        module.scores.grad = module.bias.grad = None
        y = product(module, x)
        y.backward(normal(20, 70, seed=2))
        return y.detach(), x.grad, module.scores.grad, module.bias.grad

    for scores_learn in (True, False):
        module.scores.requires_grad_(scores_learn)
        expected = gradients(MaskedLinear.forward)
        for ours, theirs in zip(gradients(QuantizedMaskedLinear.forward), expected):
            assert ours is theirs is None or torch.equal(ours, theirs)


# ---------------------------------------------------------------------------------------------- exports


@pytest.mark.parametrize(("kind", "masked"), [(None, False), ("nf4", False), ("nf4-dq", True), ("int8", True)])
def test_an_export_says_on_which_base_the_masks_were_learned(kind, masked, tmp_path):
    model = masked_llama()
    exact = base_hash(model)
    if kind is not None:
        quantize_model(model, kind, masked=masked)
    expected = {name: module.mask() for name, module in masked_modules(model).items()}
    export = read_export(save_masks(model, tmp_path / "export"))
    assert (export.base_quantization, export.quantize_masked, export.base_hash) == (kind, masked, exact)
    loaded = masked_modules(load_masks(make_llama(), tmp_path / "export"))
    assert {name: module.mask().tolist() for name, module in loaded.items()} == {
        name: mask.tolist() for name, mask in expected.items()
    }
    assert not quantized_weights(make_llama())


def test_masks_by_weight_take_exact_weights(tmp_path):
    path = save_masks(quantize_model(masked_llama(), masked=False), tmp_path / "exact", coding="by_weight")
    assert read_export(path).base_quantization == "nf4"
    quantized = quantize_model(masked_llama(), masked=True)
    with pytest.raises(ValueError, match="coding by_weight needs the exact weights, got .* choose coding rice or pack"):
        save_masks(quantized, tmp_path / "codes", coding="by_weight")
    with pytest.raises(ValueError, match="needs the exact weights, .* to read them, load the unquantised model"):
        load_masks(quantized, path)
    with pytest.raises(ValueError, match="coding must be rice .or packed. with model.quantize_masked"):
        RunConfig(model=ModelConfig(quantization="nf4", quantize_masked=True), coding="by_weight")


def test_the_hash_of_exact_weights_that_are_gone_is_refused():
    model = quantize_model(masked_llama(), masked=True)
    with pytest.raises(ValueError, match=rf"must hold the exact weights that are hashed, got 1 that are .*{GATE}"):
        base_hash(model, [GATE])


# ---------------------------------------------------------------------------------------------- a real model


@pytest.fixture(scope="module")
def real_text(tokenizer):
    """Return rows of 128 tokens from the standard library's source."""
    ids = tokenizer(Path(textwrap.__file__).read_text(encoding="utf-8"))["input_ids"][:512]
    rows = [ids[start : start + 128] for start in range(0, 512, 128)]
    return Dataset.from_dict({"input_ids": rows, "labels": rows, "document": list(range(4))})


def smollm2(directory):
    return AutoModelForCausalLM.from_pretrained(directory, local_files_only=True).requires_grad_(False)


@pytest.fixture(scope="module")
def exact_loss(smollm2_dir, real_text):
    return evaluate(smollm2(smollm2_dir), real_text).loss


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "loss_added", "bytes_a_weight"),
    [("nf4", 0.3, 0.5625), ("nf4-dq", 0.3, 0.518), ("int8", 0.03, 1.008)],
)
def test_smollm2_loses_little(smollm2_dir, real_text, exact_loss, kind, loss_added, bytes_a_weight):
    model = smollm2(smollm2_dir)
    weights = sum(module.weight.numel() for name, module in model.named_modules() if name.endswith("_proj"))
    quantize_model(model, kind)
    held = quantized_weights(model).values()
    assert sum(weight.shape.numel() for weight in held) == weights
    assert sum(weight.nbytes for weight in held) <= bytes_a_weight * weights
    quantized = evaluate(model, real_text).loss
    assert quantized != exact_loss
    assert abs(quantized - exact_loss) < loss_added
