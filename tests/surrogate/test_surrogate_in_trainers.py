"""transformers' Trainer learns with the surrogate gradient what train_masks does: with PEFT, and on a masked model."""

import pytest
import torch
from peft import get_peft_model
from tiny import make_llama, make_rows, train_by_trainer

from mft.config import MaskConfig, TrainConfig
from mft.masks.convert import mask_model, masked_modules
from mft.masks.peft import MaskPeftConfig, to_masked_model
from mft.masks.trainer_callbacks import SharpnessCallback
from mft.training.loop import train_masks

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # PEFT calls it

STEPS, LR, NORM = 4, 1e-3, 1e-3
MASK = {
    "target_modules": ["gate_proj"],
    "layers_to_transform": [1, 3],
    "mode": "value",
    "threshold": 0.0,
    "sharpness": [30.0, 300.0],
    "deletion_penalty": 2.0,
}
EXACT = 1e-6


def ours(**changes):
    """Train by train_masks; each step takes all four rows."""
    model = mask_model(make_llama(), MaskConfig(**MASK | changes))
    settings = {"schedule": "constant", "warmup_ratio": 0, "max_grad_norm": NORM, "betas": (0.9, 0.999)}
    train_masks(model, make_rows(4), TrainConfig(lr=LR, steps=STEPS, batch_size=2, accumulation=2, **settings))
    return model


def by_trainer(model, directory, *callbacks):
    return train_by_trainer(model, directory, *callbacks, max_steps=STEPS, learning_rate=LR, max_grad_norm=NORM)


def adapted(**changes):
    return get_peft_model(make_llama(), MaskPeftConfig(**MASK | changes, task_type="CAUSAL_LM"))


def farthest(one, other):
    pairs = zip(masked_modules(one).values(), masked_modules(other).values(), strict=True)
    return max((a.scores - b.scores).abs().max().item() for a, b in pairs)


@pytest.fixture(scope="module")
def expected():
    return ours()


def test_peft_learns_as_train_masks(tmp_path, expected):
    model = to_masked_model(by_trainer(adapted(), tmp_path, SharpnessCallback()))
    assert farthest(model, expected) <= EXACT
    assert farthest(model, mask_model(make_llama(), MaskConfig(**MASK))) > 100 * EXACT


def test_without_the_callback_an_adapter_learns_by_the_start(tmp_path, expected):
    model = to_masked_model(by_trainer(adapted(), tmp_path))
    assert farthest(model, ours(sharpness=30.0)) <= EXACT
    assert farthest(model, expected) > 100 * EXACT


def test_a_masked_model_learns_as_train_masks_and_keeps_no_hook(tmp_path, expected):
    model = by_trainer(mask_model(make_llama(), MaskConfig(**MASK)), tmp_path, SharpnessCallback())
    assert farthest(model, expected) <= EXACT
    assert not any(module.scores._backward_hooks for module in masked_modules(model).values())


def test_scores_that_peft_has_loaded_learn_by_it_too(tmp_path):
    """PEFT may replace them by other parameters."""
    model = adapted()
    layer = model.base_model.model.model.layers[1].mlp.gate_proj
    batch = {name: torch.tensor(make_rows(2)[name]) for name in ("input_ids", "labels")}
    model(**batch).loss.backward()
    first = layer.mft_scores["default"].grad
    layer.mft_scores["default"] = torch.nn.Parameter(layer.mft_scores["default"].detach().clone())
    model(**batch).loss.backward()
    assert torch.equal(layer.mft_scores["default"].grad, first)
    plain = adapted(sharpness=None, deletion_penalty=0.0)
    plain(**batch).loss.backward()
    straight = plain.base_model.model.model.layers[1].mlp.gate_proj.mft_scores["default"].grad
    assert not torch.equal(straight, first)
