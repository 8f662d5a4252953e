"""Experts in one parameter: converted, trained, saved and merged; the merged model equals the base's, name by name."""

import copy
import pickle

import pytest
import torch
from tiny import equal
from tiny_mixtures import IDS, KINDS, logits, mixture

from mft.config import MaskConfig
from mft.masks.base_pass import use_whole_weights
from mft.masks.convert import mask_model, masked_modules, merge_model
from mft.masks.export import base_hash, load_masks, save_masks
from mft.masks.masked_experts import MaskedExperts
from mft.masks.unmasked import unmasked_model
from mft.models.routed_experts import expert_projections
from mft_kernels import MaskedGroupedLinear


@pytest.fixture(scope="module", params=KINDS)
def base(request):
    return mixture(request.param)


def close(found, expected):
    return (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def experts_of(model):
    return (module for module in model.modules() if expert_projections(module))


def masked_copy(base, **changes):
    return mask_model(copy.deepcopy(base), MaskConfig.paper(keep_ratio=0.7, **changes))


def grouped(model):
    return {name: m for name, m in masked_modules(model).items() if isinstance(m, MaskedGroupedLinear)}


def test_with_everything_kept_the_logits_are_the_models_own_in_each_of_its_forms(base):
    masked = mask_model(copy.deepcopy(base), MaskConfig(keep_ratio=1.0))
    assert grouped(masked)
    found = logits(masked)
    assert close(found, logits(base))
    # Llama 4 and JetMoe do not use transformers' interface and have only one form.
    forms = ("eager", "grouped_mm", "batched_mm") if hasattr(next(experts_of(base)), "has_gate") else ()
    for form in forms:
        plain = copy.deepcopy(base)
        plain.set_experts_implementation(form)
        assert close(found, logits(plain)), form


def gradients(base, checkpointing=False):
    masked = masked_copy(base).train()
    if checkpointing:
        getattr(masked, "activation_checkpointing_enable", masked.gradient_checkpointing_enable)()
    masked(input_ids=IDS).logits.square().sum().backward()
    return {name: layer.scores.grad for name, layer in masked_modules(masked).items()}


def test_every_score_learns_and_checkpointing_changes_no_gradient(base):
    found = gradients(base)
    assert all(gradient.any() for gradient in found.values())
    if base.supports_gradient_checkpointing:
        assert equal(gradients(base, checkpointing=True), found)


def test_a_layers_mask_says_what_is_computed(base):
    masked = masked_copy(base)
    out = logits(masked)
    plain = copy.deepcopy(base)
    for name, layer in grouped(masked).items():
        weight = plain.get_parameter(name)
        weight.data = torch.where(layer.mask(), weight.data, 0)
    for name in masked_modules(masked).keys() - grouped(masked).keys():
        weight = plain.get_submodule(name).weight
        weight.data = torch.where(masked.get_submodule(name).mask(), weight.data, 0)
    assert close(out, logits(plain))
    assert not close(out, logits(base))


def test_copies_pickles_and_exports_compute_the_same(base, tmp_path):
    masked = masked_copy(base)
    out = logits(masked)
    for other in (copy.deepcopy(masked), pickle.loads(pickle.dumps(masked))):
        assert torch.equal(logits(other), out)
    save_masks(masked, tmp_path / "masks")
    assert base_hash(masked) == base_hash(base, masked_modules(masked))
    assert torch.equal(logits(load_masks(copy.deepcopy(base), tmp_path / "masks")), out)
    with torch.no_grad():
        next(iter(grouped(masked).values())).scores.mul_(-1).add_(1)
    assert not torch.equal(logits(masked), out)
    assert torch.equal(logits(load_masks(masked, tmp_path / "masks")), out)
    name = next(iter(grouped(masked)))
    other = copy.deepcopy(base)
    other.get_parameter(name).data[0, 0, 0] += 1
    with pytest.raises(ValueError, match="were learned on other weights of the same shapes"):
        load_masks(other, tmp_path / "masks")


def test_the_base_beside_and_within_the_masked_model_has_every_weight(base):
    masked = masked_copy(base)
    out = logits(masked)
    with use_whole_weights(masked):
        assert close(logits(masked), logits(base))
    plain = unmasked_model(masked)
    assert close(logits(plain), logits(base))
    assert [name for name, _ in plain.named_parameters()] == [name for name, _ in base.named_parameters()]
    assert not any(isinstance(module, MaskedExperts) for module in plain.modules())
    assert torch.equal(logits(masked), out)


def test_one_of_two_projections_alone(base):
    names = list(grouped(masked_copy(base)))
    one = masked_copy(base, target_parameters=[names[0]])
    assert list(masked_modules(one)) == [names[0]]
    one(input_ids=IDS).logits.square().sum().backward()
    assert one.get_submodule(names[0]).scores.grad.abs().sum() > 0
    merged = merge_model(one)
    assert [type(m) for m in merged.modules()] == [type(m) for m in base.modules()]
    assert [name for name, _ in merged.named_parameters()] == [name for name, _ in base.named_parameters()]
    everything = mask_model(copy.deepcopy(base), MaskConfig(keep_ratio=1.0, target_parameters=[names[0]]))
    assert close(logits(everything), logits(base))
