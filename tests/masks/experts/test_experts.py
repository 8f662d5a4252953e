"""Experts in one parameter: converted, trained, saved and merged; the merged model equals the base's, name by name."""

import copy
import pickle

import pytest
import torch
from tiny_mixtures import IDS, KINDS, mixture

from mft.config import MaskConfig
from mft.masks.base_pass import as_base
from mft.masks.convert import mask_model, masked_modules, merge_model
from mft.masks.experts import MaskedExperts
from mft.masks.export import base_hash, load_masks, save_masks
from mft.masks.merged_weights import merged_weights
from mft.masks.unmasked import unmasked_model
from mft.models.experts import expert_projections
from mft_kernels import MaskedGroupedLinear


@pytest.fixture(scope="module", params=KINDS)
def base(request):
    return mixture(request.param)


@torch.no_grad()
def _logits(model):
    return model(input_ids=IDS, use_cache=False).logits


def _close(found, expected):
    return (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def _experts(model):
    return (module for module in model.modules() if expert_projections(module))


def _masked(base, **changes):
    return mask_model(copy.deepcopy(base), MaskConfig.paper(keep_ratio=0.7, **changes))


def _grouped(model):
    return {name: m for name, m in masked_modules(model).items() if isinstance(m, MaskedGroupedLinear)}


def test_with_everything_kept_the_logits_are_the_models_own_in_each_of_its_forms(base):
    masked = mask_model(copy.deepcopy(base), MaskConfig(keep_ratio=1.0))
    assert _grouped(masked)
    found = _logits(masked)
    assert _close(found, _logits(base))
    # Llama 4 and JetMoe do not use transformers' interface and have only one form.
    forms = ("eager", "grouped_mm", "batched_mm") if hasattr(next(_experts(base)), "has_gate") else ()
    for form in forms:
        plain = copy.deepcopy(base)
        plain.set_experts_implementation(form)
        assert _close(found, _logits(plain)), form


def test_every_score_learns_and_a_layers_mask_says_what_is_computed(base):
    masked = _masked(base)
    masked(input_ids=IDS).logits.square().sum().backward()
    for name, layer in masked_modules(masked).items():
        assert layer.scores.grad.abs().sum() > 0, name
    out = _logits(masked)
    plain = copy.deepcopy(base)
    for name, layer in _grouped(masked).items():
        weight = plain.get_parameter(name)
        weight.data = torch.where(layer.mask(), weight.data, 0)
    for name in masked_modules(masked).keys() - _grouped(masked).keys():
        weight = plain.get_submodule(name).weight
        weight.data = torch.where(masked.get_submodule(name).mask(), weight.data, 0)
    assert _close(out, _logits(plain))
    assert not _close(out, _logits(base))


def test_merged_the_model_is_of_its_own_class_with_its_own_names(base):
    masked = _masked(base)
    layers, out, one_by_one = _grouped(masked), _logits(masked), dict(merged_weights(masked))
    masks = {name: layer.mask() for name, layer in layers.items()}
    merged = merge_model(masked)
    names = [name for name, _ in base.named_parameters()]
    assert [name for name, _ in merged.named_parameters()] == names
    assert [type(m) for m in merged.modules()] == [type(m) for m in base.modules()]
    for name, mask in masks.items():
        assert torch.equal(merged.get_parameter(name), torch.where(mask, base.get_parameter(name), 0))
    state = merged.state_dict()
    assert set(names) <= one_by_one.keys() <= state.keys()
    for name, tensor in one_by_one.items():
        assert torch.equal(state[name], tensor), name
    assert _close(_logits(merged), out)


def test_merged_by_alpha_dropped_weights_of_experts_are_scaled(base):
    masked = _masked(base)
    masks = {name: layer.mask() for name, layer in _grouped(masked).items()}
    merged = merge_model(masked, alpha=0.75)
    for name, mask in masks.items():
        weight = base.get_parameter(name)
        assert torch.equal(merged.get_parameter(name), torch.where(mask, weight, weight * 0.25)), name


def test_copies_pickles_and_exports_compute_the_same(base, tmp_path):
    masked = _masked(base)
    out = _logits(masked)
    for other in (copy.deepcopy(masked), pickle.loads(pickle.dumps(masked))):
        assert torch.equal(_logits(other), out)
    save_masks(masked, tmp_path / "masks")
    assert base_hash(masked) == base_hash(base, masked_modules(masked))
    assert torch.equal(_logits(load_masks(copy.deepcopy(base), tmp_path / "masks")), out)
    with torch.no_grad():
        next(iter(_grouped(masked).values())).scores.mul_(-1).add_(1)
    assert not torch.equal(_logits(masked), out)
    assert torch.equal(_logits(load_masks(masked, tmp_path / "masks")), out)
    name = next(iter(_grouped(masked)))
    other = copy.deepcopy(base)
    other.get_parameter(name).data[0, 0, 0] += 1
    with pytest.raises(ValueError, match="were learned on other weights of the same shapes"):
        load_masks(other, tmp_path / "masks")


def test_the_base_beside_and_within_the_masked_model_has_every_weight(base):
    masked = _masked(base)
    out = _logits(masked)
    with as_base(masked):
        assert _close(_logits(masked), _logits(base))
    plain = unmasked_model(masked)
    assert _close(_logits(plain), _logits(base))
    assert [name for name, _ in plain.named_parameters()] == [name for name, _ in base.named_parameters()]
    assert not any(isinstance(module, MaskedExperts) for module in plain.modules())
    assert torch.equal(_logits(masked), out)


def test_one_of_two_projections_alone(base):
    names = list(_grouped(_masked(base)))
    one = _masked(base, target_parameters=[names[0]])
    assert list(masked_modules(one)) == [names[0]]
    one(input_ids=IDS).logits.square().sum().backward()
    assert one.get_submodule(names[0]).scores.grad.abs().sum() > 0
    merged = merge_model(one)
    assert [type(m) for m in merged.modules()] == [type(m) for m in base.modules()]
    assert [name for name, _ in merged.named_parameters()] == [name for name, _ in base.named_parameters()]
    everything = mask_model(copy.deepcopy(base), MaskConfig(keep_ratio=1.0, target_parameters=[names[0]]))
    assert _close(_logits(everything), _logits(base))


def test_gradient_checkpointing_gives_the_same_gradients(base):
    if not base.supports_gradient_checkpointing:
        pytest.skip(f"{type(base).__name__} has no gradient checkpointing")
    grads = []
    for checkpointing in (False, True):
        masked = _masked(base).train()
        if checkpointing:
            getattr(masked, "activation_checkpointing_enable", masked.gradient_checkpointing_enable)()
        masked(input_ids=IDS).logits.square().sum().backward()
        grads.append([layer.scores.grad for layer in masked_modules(masked).values()])
    for one, other in zip(*grads):
        assert torch.equal(one, other)
