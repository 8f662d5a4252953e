"""The surrogate gradient: its formula compared with autograd, and the same result in every way of running a step."""

import pytest
import torch
from tiny import make_llama, make_rows
from tiny_ways import EXACT, WAYS

from mft.config import MaskConfig, TrainConfig
from mft.masks.convert import mask_model, masked_modules, merge_model
from mft.masks.surrogate import Surrogate, make_surrogate, surrogate_of
from mft.training.loop import train_masks

ASKED = {"mode": "value", "threshold": 0.0, "init": "magnitude", "sharpness": [30.0, 300.0], "deletion_penalty": 0.5}
OFF = {"sharpness": None, "deletion_penalty": 0.0}


def masked(dtype=torch.float32, **changes):
    layers = {"target_modules": ["gate_proj", "up_proj"], "layers_to_transform": [1, 2, 3]}
    return mask_model(make_llama(dtype), MaskConfig(**layers | ASKED | changes))


def train(way, model=None, **options):
    model = masked() if model is None else model
    settings = TrainConfig(**{"lr": 1e-3, "steps": 3, "batch_size": 2, "accumulation": 2} | options)
    reports = train_masks(model, make_rows(), settings, way=way)
    return {name: module.scores.detach().float().clone() for name, module in masked_modules(model).items()}, reports


def farthest(one, other):
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


@pytest.mark.parametrize(("mode", "threshold"), [("value", 0.0), ("value", -0.3), ("magnitude", 0.4)])
def test_the_gradient_is_that_of_the_sigmoid_and_of_the_penalty(mode, threshold):
    """With autograd: a smooth mask of slope 1 at the threshold, and the mean of what it drops."""
    generator = torch.Generator().manual_seed(0)
    grad_keep, weight, scores = (torch.randn(2, 300, 7, generator=generator) for _ in range(3))
    smooth = scores.double().requires_grad_()
    k, penalty, others = 3.0, 0.7, 1000  # masked weights in other layers
    x = (smooth.abs() if mode == "magnitude" else smooth) - threshold
    loss = (4 / k * torch.sigmoid(k * x) * grad_keep.double() * weight.double()).sum()
    loss += penalty * torch.sigmoid(-k * x).sum() / (x.numel() + others)
    loss.backward()
    surrogate = Surrogate(k, k, penalty, x.numel() + others)
    found = grad_keep.clone()
    surrogate.replace(found, scores, threshold=threshold, mode=mode, weight=weight)
    torch.testing.assert_close(found, smooth.grad.float(), rtol=1e-5, atol=1e-7)
    straight = grad_keep * weight * (scores.sign() if mode == "magnitude" else 1)
    again = surrogate.gradient(straight, scores, threshold=threshold, mode=mode)
    assert torch.equal(again, found)
    surrogate.penalty = 0.0
    without = surrogate.gradient(straight, scores, threshold=threshold, mode=mode)
    surrogate.penalty = penalty
    assert torch.equal(surrogate.gradient(straight, scores, threshold=threshold, mode=mode, penalised=False), without)


def test_at_the_threshold_a_score_learns_by_the_straight_through_gradient():
    grad = torch.full((1, 3), 0.5)
    found = Surrogate(1e4, 1e4, 0.0, 3).gradient(grad, torch.full((1, 3), 0.25), threshold=0.25, mode="value")
    assert torch.equal(found, grad)


def test_the_sharpness_goes_from_start_to_end_by_one_factor_a_step():
    surrogate = make_surrogate(MaskConfig(threshold=0, sharpness=[50, 5000]), 1)
    found = []
    for step in range(1, 6):
        surrogate.sharpen(step, 5)
        found.append(surrogate.sharpness)
    assert found == pytest.approx([50, 50 * 10**0.5, 500, 500 * 10**0.5, 5000])
    surrogate.sharpen(1, 1)
    assert surrogate.sharpness == 50
    assert make_surrogate(MaskConfig(threshold=0, sharpness=7), 1).end == 7
    assert make_surrogate(MaskConfig(threshold=0), 1) is None


@pytest.fixture(scope="module")
def plain():
    return train("plain")


@pytest.mark.parametrize("changes", [OFF, {"deletion_penalty": 0.0}, {"sharpness": 30}], ids=["off", "free", "blunt"])
def test_sharpness_its_end_and_the_penalty_each_make_a_difference(changes, plain):
    assert farthest(train("plain", masked(**changes))[0], plain[0]) > 10 * EXACT


@pytest.mark.parametrize("way", WAYS)
def test_sixteen_bit_weights_scores_and_moments(way):
    """Buffers in bf16 hold the surrogate's gradient too: as near to plain as three steps can be."""
    few = {"steps": 3, "moments": "8bit"}
    ours = train(way, masked(torch.bfloat16, scores_dtype="bfloat16"), **few)[0]
    assert farthest(ours, train("plain", masked(torch.bfloat16, scores_dtype="bfloat16"), **few)[0]) <= 3e-3
    assert farthest(ours, train(way, masked(torch.bfloat16, scores_dtype="bfloat16", **OFF), **few)[0]) > 0


def test_a_penalty_drops_less():
    free, dear = (train("plain", masked(deletion_penalty=penalty), lr=1e-2)[1][-1].dropped for penalty in (0, 100))
    assert free > 0
    assert dear == 0


def test_a_merged_model_has_no_surrogate():
    model = masked()
    assert surrogate_of(model) is not None
    assert surrogate_of(merge_model(model)) is None
