"""Flips over training: what is counted."""

from tiny import make_rows, masked_llama

from mft.config import TrainConfig
from mft.flips import FlipCounter
from mft.inspection import initial_masks
from mft.recipe import train_masks


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
