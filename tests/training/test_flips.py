"""Flips over training: what is counted."""

import pytest
import torch
from tiny import make_rows, masked_llama

from mft.config import TrainConfig
from mft.masks.inspection import initial_masks
from mft.training.flips import FlipCounter
from mft.training.loop import train_masks


def share(a, b):
    return sum(int((a[name] != b[name]).sum()) for name in a) / sum(mask.numel() for mask in a.values())


def test_the_flip_curve_follows_training():
    model = masked_llama(init="magnitude")
    counter = FlipCounter(model, initial_masks(model), every=2)
    masks = [initial_masks(model)]

    def on_step(report):
        counter(report)
        masks.append(initial_masks(model))

    train_masks(model, make_rows(), TrainConfig(lr=3e-3, steps=5), on_step=on_step)
    curve = counter.curve
    assert curve.steps == [2, 4, 5]
    assert curve.from_start == [share(masks[step], masks[0]) for step in (2, 4, 5)]
    assert curve.from_start[-1] > 0
    since = [(2, 0), (4, 2), (5, 4)]
    assert curve.a_step == [share(masks[now], masks[then]) / (now - then) for now, then in since]


def test_the_last_step_of_a_run_that_ends_early_is_counted():
    model = masked_llama(init="magnitude")
    counter = FlipCounter(model, initial_masks(model), every=2)
    reports = train_masks(model, make_rows(), TrainConfig(lr=3e-3, steps=3), on_step=lambda report: None)
    reports[-1].steps = 9
    assert counter(reports[-1]) is None
    assert counter.finish(reports[-1])["step"] == 3
    assert counter.finish(reports[-1]) is None


def test_a_checkpoint_without_the_masks_counted_last_is_refused():
    counter = FlipCounter(masked_llama(), initial_masks(masked_llama()))
    tensors = counter.take_state()
    assert tensors.pop("flips.step") == torch.tensor(0)
    with pytest.raises(ValueError, match=r"must hold the masks that flips were last counted on, flips.step is missing"):
        counter.put_state(tensors)
