"""transformers' Trainer learns under a budget, and by the surrogate gradient, what train_masks does, also with PEFT."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft_masks import STILL_CALLED
from tiny import make_llama, make_rows, train_by_trainer

from mft.config import MaskConfig, TrainConfig
from mft.masks.budget import budget_of, grow_budget
from mft.masks.convert import mask_model, masked_modules
from mft.masks.peft import MaskPeftConfig, to_masked_model
from mft.masks.peft_layers.layer import MaskTunerLayer
from mft.masks.trainer_callbacks import BudgetCallback, SharpnessCallback
from mft.training.loop import train_masks
from mft_kernels import unpack_mask
from mft_kernels.ops.checks import NonFiniteScores

pytestmark = STILL_CALLED

STEPS, LR, NORM = 4, 1e-3, 1e-3
EXACT = 1e-6
LAYERS = {"layers_to_transform": [1, 3]}
BUDGET = LAYERS | {"target_modules": ["gate_proj", "up_proj"], "budget": 0.03, "mode": "magnitude"}
SHARP = LAYERS | {"target_modules": ["gate_proj"], "mode": "value", "threshold": 0.0}
SHARP |= {"sharpness": [30.0, 300.0], "deletion_penalty": 2.0}
# The masks, the callback, and the masks that an adapter learns without it.
CASES = {
    "budget": (BUDGET, BudgetCallback, {"budget_ramp": 0}),
    "sharpness": (SHARP, SharpnessCallback, {"sharpness": 30.0}),
}
QUOTA = int(0.03 * 4 * 2048)
BATCH = {name: torch.tensor(make_rows(2)[name]) for name in ("input_ids", "labels")}


def masked(mask):
    return mask_model(make_llama(), MaskConfig(**mask))


def ours(mask):
    """Train by train_masks; each step takes all four rows."""
    model = masked(mask)
    settings = {"schedule": "constant", "warmup_ratio": 0, "max_grad_norm": NORM, "betas": (0.9, 0.999)}
    train_masks(model, make_rows(4), TrainConfig(lr=LR, steps=STEPS, batch_size=2, accumulation=2, **settings))
    return model


def by_trainer(model, directory, *callbacks):
    return train_by_trainer(model, directory, *callbacks, max_steps=STEPS, learning_rate=LR, max_grad_norm=NORM)


def adapted(mask=BUDGET, **changes):
    return get_peft_model(make_llama(), MaskPeftConfig(**mask | changes, task_type="CAUSAL_LM"))


def assert_same(one, other):
    for a, b in zip(masked_modules(one).values(), masked_modules(other).values(), strict=True):
        assert (a.scores - b.scores).abs().max() <= EXACT
        assert torch.equal(a.mask(), b.mask())


def farthest(one, other):
    pairs = zip(masked_modules(one).values(), masked_modules(other).values(), strict=True)
    return max((a.scores - b.scores).abs().max().item() for a, b in pairs)


@pytest.mark.parametrize("kind", CASES)
def test_peft_and_a_masked_model_learn_as_train_masks(kind, tmp_path):
    mask, callback, _ = CASES[kind]
    expected = ours(mask)
    assert_same(to_masked_model(by_trainer(adapted(mask), tmp_path, callback())), expected)
    model = by_trainer(masked(mask), tmp_path, callback())
    assert_same(model, expected)
    assert not any(module.scores._backward_hooks for module in masked_modules(model).values())
    assert farthest(model, masked(mask)) > 100 * EXACT


@pytest.mark.parametrize("kind", CASES)
def test_without_the_callback_an_adapter_has_the_whole_budget_or_the_first_sharpness(kind, tmp_path):
    mask, _, changes = CASES[kind]
    model = to_masked_model(by_trainer(adapted(mask), tmp_path))
    assert_same(model, ours(mask | changes))
    assert farthest(model, ours(mask)) > 10 * EXACT


def layers_of(model):
    return [module for module in model.modules() if isinstance(module, MaskTunerLayer)]


def dropped(model, name="default"):
    """Return the number of dropped weights by layer, in the masks that PEFT computes with."""
    masks = [layer.packed_mask(name, "weight", anew=False) for layer in layers_of(model)]
    return [int((~unpack_mask(mask, (64, 32))).sum()) for mask in masks]


def test_a_layer_sees_what_was_written_into_another():
    model = adapted()
    first, *_, last = layers_of(model)
    before = dropped(model)
    first.mft_scores["default"].data.mul_(1e6)  # then all its weights are kept
    model(**BATCH)
    after = dropped(model)
    assert after[0] == 0
    assert sum(after) == sum(before) == QUOTA
    last.mft_scores["default"] = torch.nn.Parameter(last.mft_scores["default"].detach() * 1e6)  # as PEFT loads scores
    model.merge_adapter()
    zeros = [int((layer.base_layer.weight == 0).sum()) for layer in layers_of(model)]
    assert zeros[0] == zeros[-1] == 0
    assert sum(zeros) == QUOTA


def test_a_saved_adapter_drops_the_same(tmp_path):
    model = by_trainer(adapted(), tmp_path / "run", BudgetCallback())
    assert sum(dropped(model)) == QUOTA
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(make_llama(), tmp_path / "adapter")
    assert budget_of(loaded.peft_config["default"]).share == 0.03
    with torch.no_grad():
        assert torch.equal(loaded.eval()(**BATCH).logits, model.eval()(**BATCH).logits)
    assert dropped(loaded) == dropped(model)


def test_a_copy_has_a_threshold_of_its_own():
    model = adapted()
    model(**BATCH)
    other = copy.deepcopy(model)
    layers_of(other)[0].mft_scores["default"].data.mul_(1e6)
    other(**BATCH)
    assert dropped(other)[0] == 0
    assert dropped(model)[0] > 0


def test_scores_that_are_not_finite_name_their_layer_whichever_asks():
    model = adapted()
    layers_of(model)[-1].mft_scores["default"].data[0, 0] = torch.nan
    with pytest.raises(NonFiniteScores, match=r"'model\.layers\.3\.mlp\.up_proj' must be finite, got 1 NaN"):
        model(**BATCH)


@pytest.mark.parametrize("wrap", [torch.nn.DataParallel, torch.compile])
@pytest.mark.parametrize("make", [lambda: masked(BUDGET), adapted])
def test_the_budget_of_a_wrapped_model_grows(make, wrap):
    model = make()
    quota = []
    for step in range(3):
        grow_budget(wrap(model), step, 2)
        quota.append(budget_of(getattr(model, "peft_config", {}).get("default", model)).quota)
    assert quota == [0, int(0.03 * 4 * 2048 / (2 * 0.67)), QUOTA]


def test_scores_that_peft_has_loaded_learn_by_the_surrogate_gradient_too():
    """PEFT may replace them by other parameters."""
    model, plain = adapted(SHARP), adapted(SHARP, sharpness=None, deletion_penalty=0.0)
    layer, straight = (layers_of(each)[0].mft_scores for each in (model, plain))
    model(**BATCH).loss.backward()
    first = layer["default"].grad
    layer["default"] = torch.nn.Parameter(layer["default"].detach().clone())
    model(**BATCH).loss.backward()
    assert torch.equal(layer["default"].grad, first)
    plain(**BATCH).loss.backward()
    assert not torch.equal(straight["default"].grad, first)
