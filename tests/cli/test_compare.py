"""The comparison: what it selects on, what it leaves alone, and what its arms share."""

import copy

import pytest
import torch
from tiny import make_llama, make_rows

from mft.config import MaskConfig, TrainConfig
from mft.data.splits import Splits
from mft.demo.compare import ARMS, CONTROL, FULL, MAGNITUDE, MFT, RANDOM, compare
from mft.masks.convert import masked_modules
from mft.models.causal_lm import clone_with_own_weights
from mft.training.metrics import Recorder

MASK = MaskConfig(layers_to_transform=[2, 3], init="magnitude")
TRAIN = TrainConfig(lr=1.0, steps=3, batch_size=2)


def run(**options):
    model = make_llama()
    before = copy.deepcopy(model.state_dict())
    splits = Splits(make_rows(4, seed=1), make_rows(4, seed=2), make_rows(6, seed=3))
    comparison = compare(
        model,
        splits,
        MASK,
        TRAIN,
        **{"extensions": 0, "mask_lrs": (1e-3, 1e-2), "control_lrs": (1e-4, 1e-2, 1e-3)} | options,
    )
    return model, before, comparison


def test_every_arm_is_evaluated_on_the_same_test_tokens():
    *_, comparison = run(base=make_llama())
    assert tuple(comparison.arms) == ARMS
    for result in comparison.arms.values():
        assert result.tokens.tolist() == [22, 22, 22]


def test_the_fine_tuned_model_is_left_unchanged():
    model, before, _ = run()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert not masked_modules(model)


def test_each_arm_takes_the_rate_that_validation_likes_best():
    *_, comparison = run()
    assert [(t.arm, t.lr) for t in comparison.trials] == [
        (CONTROL, 1e-4),
        (CONTROL, 1e-3),
        (CONTROL, 1e-2),
        (MFT, 1e-3),
        (MFT, 1e-2),
    ]
    for arm in (CONTROL, MFT):
        losses = {t.lr: t.validation_loss for t in comparison.trials if t.arm == arm}
        assert comparison.chosen_lr(arm) == min(losses, key=losses.get)
    assert comparison.chosen_lr(RANDOM) is None


def test_the_test_split_is_opened_once_an_arm_and_after_all_choices():
    events = []

    class Spy(Recorder):
        def evaluate(self, phase, model, dataset, **options):
            events.append(phase)
            return super().evaluate(phase, model, dataset, **options)

    run(recorder=Spy())
    assert events[-5:] == [f"{arm}, test" for arm in (FULL, CONTROL, RANDOM, MAGNITUDE, MFT)]
    assert all(event.endswith("validation") for event in events[:-5])


def test_arms_need_rates():
    with pytest.raises(ValueError, match=r"must each hold a rate, got \[\] and"):
        run(mask_lrs=())


def test_a_clone_shares_all_weights_but_its_own():
    model = make_llama()
    own = "model.layers.3.mlp.up_proj"
    clone = clone_with_own_weights(model, [own])
    for (name, theirs), ours in zip(clone.named_parameters(), model.parameters()):
        assert (theirs.data_ptr() == ours.data_ptr()) == (name != f"{own}.weight")
        assert torch.equal(theirs, ours)
    assert clone.lm_head is not model.lm_head
