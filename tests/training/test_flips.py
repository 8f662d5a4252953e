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
    events, masks = [], [initial_masks(model)]
    counter = FlipCounter(model, masks[0], lambda **event: events.append(event), every=2)

    def on_step(report):
        counter(report)
        masks.append(initial_masks(model))

    train_masks(model, make_rows(), TrainConfig(lr=3e-3, steps=5), on_step=on_step)
    assert [event["step"] for event in events] == [2, 4, 5]
    assert [event["from_start"] for event in events] == [share(masks[step], masks[0]) for step in (2, 4, 5)]
    assert events[-1]["from_start"] > 0
    since = [(2, 0), (4, 2), (5, 4)]
    assert [event["a_step"] for event in events] == [share(masks[b], masks[a]) / (b - a) for b, a in since]


def test_the_last_step_of_a_run_that_ends_early_is_counted():
    model = masked_llama(init="magnitude")
    events = []
    counter = FlipCounter(model, initial_masks(model), lambda **event: events.append(event["step"]), every=2)
    reports = train_masks(model, make_rows(), TrainConfig(lr=3e-3, steps=3), on_step=lambda report: None)
    reports[-1].steps = 9
    counter(reports[-1])
    assert events == []
    counter.finish(reports[-1])
    counter.finish(reports[-1])
    assert events == [3]


def test_a_checkpoint_without_the_masks_counted_last_is_refused():
    counter = FlipCounter(masked_llama(), initial_masks(masked_llama()), print)
    tensors = counter.take_state()
    assert tensors.pop("flips.step") == torch.tensor(0)
    with pytest.raises(ValueError, match=r"must hold the masks that flips were last counted on, flips.step is missing"):
        counter.put_state(tensors)
