"""transformers' Trainer and PEFT drop the same budget as train_masks, with the same threshold."""

import copy
import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny import make_llama, make_rows, train_by_trainer

from mft.config import MaskConfig, TrainConfig
from mft.masks.budget import budget_of, grow_budget
from mft.masks.convert import mask_model, masked_modules
from mft.masks.peft import MaskPeftConfig, to_masked_model
from mft.masks.peft_layers.layer import MaskTunerLayer
from mft.masks.trainer_callbacks import BudgetCallback
from mft.training.loop import train_masks
from mft_kernels import unpack_mask
from mft_kernels.ops.checks import NonFiniteScores

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # PEFT calls it

STEPS, LR = 4, 1e-3
MASK = {"target_modules": ["gate_proj", "up_proj"], "layers_to_transform": [1, 3], "budget": 0.03, "mode": "magnitude"}
QUOTA = int(0.03 * 4 * 2048)
EXACT = 1e-6
BATCH = {name: torch.tensor(make_rows(2)[name]) for name in ("input_ids", "labels")}


def ours(**changes):
    """Train by train_masks; each step takes all four rows."""
    model = mask_model(make_llama(), MaskConfig(**MASK | changes))
    settings = {"schedule": "constant", "warmup_ratio": 0, "betas": (0.9, 0.999)}  # the Trainer's
    train_masks(model, make_rows(4), TrainConfig(lr=LR, steps=STEPS, batch_size=2, accumulation=2, **settings))
    return model


def by_trainer(model, directory, *callbacks):
    return train_by_trainer(model, directory, *callbacks, max_steps=STEPS, learning_rate=LR, max_grad_norm=0.0)


def adapted(**changes):
    return get_peft_model(make_llama(), MaskPeftConfig(**MASK | changes, task_type="CAUSAL_LM"))


def layers_of(model):
    return [module for module in model.modules() if isinstance(module, MaskTunerLayer)]


def dropped(model, name="default"):
    """Return the number of dropped weights by layer, in the masks that PEFT computes with."""
    masks = [layer.current_mask(name, "weight") for layer in layers_of(model)]
    return [int((~unpack_mask(mask, (64, 32))).sum()) for mask in masks]


def assert_same(one, other):
    for a, b in zip(masked_modules(one).values(), masked_modules(other).values(), strict=True):
        assert (a.scores - b.scores).abs().max() <= EXACT
        assert torch.equal(a.mask(), b.mask())


def test_peft_learns_as_train_masks(tmp_path):
    model = by_trainer(adapted(), tmp_path, BudgetCallback())
    assert sum(dropped(model)) == QUOTA
    assert_same(to_masked_model(model), ours())


def test_without_the_callback_an_adapter_drops_its_budget_from_the_first_step(tmp_path):
    model = adapted()
    assert sum(dropped(model)) == QUOTA
    assert_same(to_masked_model(by_trainer(model, tmp_path)), ours(budget_ramp=0))


def test_a_masked_model_learns_as_train_masks(tmp_path):
    model = mask_model(make_llama(), MaskConfig(**MASK))
    assert_same(by_trainer(model, tmp_path, BudgetCallback()), ours())


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
@pytest.mark.parametrize("make", [lambda: mask_model(make_llama(), MaskConfig(**MASK)), adapted])
def test_the_budget_of_a_wrapped_model_grows(make, wrap):
    model = make()
    quota = []
    for step in range(3):
        grow_budget(wrap(model), step, 2)
        quota.append(budget_of(getattr(model, "peft_config", {}).get("default", model)).quota)
    assert quota == [0, int(0.03 * 4 * 2048 / (2 * 0.67)), QUOTA]


def test_an_adapter_from_before_a_budget_was_a_bound_keeps_the_rule_that_it_began_with(tmp_path):
    MaskPeftConfig(budget=0.1, mode="value", fill_budget=True).save_pretrained(str(tmp_path))
    path = tmp_path / "adapter_config.json"
    values = json.loads(path.read_text())
    assert values.pop("fill_budget") is True
    path.write_text(json.dumps(values))
    assert MaskPeftConfig.from_pretrained(str(tmp_path)).fill_budget is True
