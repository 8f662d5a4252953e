"""The dropped share that a run reports for masks with a threshold: in every way, and only at logged steps."""

import pytest
import torch
from tiny import make_rows, masked_llama

from mft.config import TrainConfig
from mft.masks.convert import masked_modules
from mft.training.loop import train_masks

STEPS = TrainConfig(lr=1e-2, steps=5, log_every=2)
FREE = {"mode": "value", "threshold": 0.0, "init": "magnitude"}


def share(model):
    return 1 - torch.cat([m.mask().flatten() for m in masked_modules(model).values()]).float().mean().item()


def test_it_is_that_of_the_masks_at_steps_that_are_logged():
    model, shares = masked_llama(**FREE), []
    reports = train_masks(model, make_rows(), STEPS, on_step=lambda _: shares.append(share(model)))
    assert [report.dropped for report in reports] == pytest.approx([None, shares[1], None, shares[3], shares[4]])
    assert 0 < shares[4] < 1
    assert {report.dropped for report in train_masks(masked_llama(), make_rows(), STEPS)} == {None}  # of a ratio


@pytest.mark.parametrize("way", ["resident", "layerwise"])
def test_other_ways_tell_the_last_as_it_is(way):
    model = masked_llama(**FREE)
    assert train_masks(model, make_rows(), STEPS, way=way)[-1].dropped == pytest.approx(share(model))
