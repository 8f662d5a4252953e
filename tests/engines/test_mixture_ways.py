"""A masked mixture, with the experts in one parameter each, in all ways: the plain update, and bitwise resumption."""

import math
import os
import signal

import pytest
import torch
from test_ways import EXACT, TOLERANCE, assert_same_training, scores_of, train
from tiny import make_rows
from tiny_architectures import MIXTURES

import mft.engines.mode
from mft.config import MaskConfig, TrainConfig
from mft.engines.offload import Mover
from mft.evaluation.evaluate import evaluate
from mft.masks.convert import mask_model, masked_modules
from mft.masks.quantize import quantize_model
from mft.models.codes.weight import quantized_weights
from mft.objectives.dpo import DPO
from mft.objectives.kl import KL
from mft.training.best import Best
from mft.training.checkpoint import newest_checkpoint
from mft.training.loop import train_masks
from mft.training.saver import Saver, Stopped
from mft.training.validation import Validation
from mft_kernels import MaskedGroupedLinear

BY_LAYERS = ["resident", "layerwise"]
WAYS = ["in_place", *BY_LAYERS]


@pytest.fixture(autouse=True, params=[True])
def separate(request, monkeypatch):
    """Run on the CPU as if it were a device with its own memory."""
    monkeypatch.setattr(mft.engines.mode, "Mover", lambda device: Mover(device, separate=request.param))


def mixture(kind="gpt_oss", dtype=torch.float32, layers=None, changes=None, **mask):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MIXTURES[kind](**changes or {}).to(dtype).eval()
    return mask_model(model, MaskConfig.paper(layers_to_transform=layers, **mask))


def experts_of(model):
    return {name: m for name, m in masked_modules(model).items() if isinstance(m, MaskedGroupedLinear)}


@pytest.mark.parametrize("kind", MIXTURES)
def test_every_way_gives_the_plain_update(kind):
    start = scores_of(mixture(kind))
    options = {"accumulation": 3, "steps": 2}
    plain = train("plain", mixture(kind), **options)
    for way in WAYS:
        assert_same_training(train(way, mixture(kind), **options), plain, TOLERANCE[way])
    experts = experts_of(plain[0])
    assert len(experts) == 6
    for name in experts:
        moved = (scores_of(plain[0])[name] - start[name]).abs().amax((1, 2))
        assert moved.min() > 1e-3, name


@pytest.mark.parametrize("mask", [{"mode": "value"}, {"threshold": 0.01}], ids=["value", "threshold"])
def test_every_kind_of_mask(mask):
    runs = {way: train(way, mixture(**mask)) for way in ("plain", *WAYS)}
    for way in WAYS:
        assert_same_training(runs[way], runs["plain"], TOLERANCE[way])


def test_clipping_by_the_global_norm():
    clipped = train("resident", mixture(), max_grad_norm=1e-3)
    assert_same_training(clipped, train("plain", mixture(), max_grad_norm=1e-3))
    free = scores_of(train("resident", mixture())[0])
    assert any((free[name] - ours).abs().max() > 10 * EXACT for name, ours in scores_of(clipped[0]).items())


@pytest.mark.parametrize("scores_dtype", ["bfloat16", "int16"])
def test_scores_and_moments_in_few_bits_learn_the_same_bit_for_bit(scores_dtype):
    one, other = (train(way, mixture(scores_dtype=scores_dtype), moments="8bit", steps=4) for way in BY_LAYERS)
    assert one[1] == other[1]
    before = scores_of(mixture(scores_dtype=scores_dtype))
    for name, scores in scores_of(one[0]).items():
        assert torch.equal(scores, scores_of(other[0])[name])
        assert not torch.equal(scores, before[name])


@pytest.mark.parametrize("way", ["plain", *WAYS])
def test_frozen_layers_below_are_remembered(way):
    model, calls = mixture(layers=[2]), []
    model.model.layers[0].mlp.register_forward_hook(lambda *_: calls.append(1))
    options = {"steps": 4, "rows": make_rows(4)}
    ours = train(way, model, **options)
    assert len(calls) <= 2 + 6  # plus those that examine how the model is built
    assert_same_training(ours, train("plain", mixture(layers=[2]), **options), TOLERANCE[way])
    model = mixture(layers=[2])
    settings = TrainConfig(lr=1e-3, batch_size=2, steps=4)
    losses = [report.loss for report in train_masks(model, options["rows"], settings, way=way, remember=False)]
    assert_same_training(ours, (model, losses))


def test_packed_rows_do_not_see_each_other():
    rows = make_rows().add_column("starts", [[0, 3 + i % 5] for i in range(8)])
    plain = train("plain", mixture("qwen3_moe"), rows)
    for way in WAYS:
        assert_same_training(train(way, mixture("qwen3_moe"), rows), plain, TOLERANCE[way])
    assert plain[1] != pytest.approx(train("plain", mixture("qwen3_moe"))[1], abs=1e-4)


@pytest.mark.parametrize("objective", [lambda: KL(beta=0.7), lambda: DPO(beta=0.5)], ids=["kl", "dpo"])
def test_objectives_that_ask_for_the_base(objective):
    rows = make_rows().add_column("starts", [[0, 5 + i % 3] for i in range(8)])
    settings = TrainConfig(lr=1e-2, batch_size=2, steps=3)
    runs = []
    for way in ("plain", *WAYS):
        model = mixture("qwen3_moe")
        reports = train_masks(model, rows, settings, way=way, objective=objective())
        runs.append((model, [report.loss for report in reports]))
    for way, run in zip(WAYS, runs[1:]):
        assert_same_training(run, runs[0], 10 * TOLERANCE[way])  # which is for steps at 1e-3
    assert len(set(runs[0][1])) == 3


@pytest.mark.parametrize("way", ["plain", *BY_LAYERS])
def test_evaluation_in_the_middle_moves_no_bit_and_the_best_step_is_put_back(way, tmp_path):
    held_out, found = make_rows(6, seed=1), {}
    fixed = {"lr": 1e-2, "schedule": "constant", "warmup_ratio": 0.0}
    (short, _), (quiet, losses) = (train(way, mixture(), steps=steps, **fixed) for steps in (1, 2))
    model = mixture()
    validation = Validation(
        held_out, best=Best(tmp_path), batch_size=3, on_result=lambda step, result, *_: found.update({step: result})
    )
    settings = TrainConfig(**fixed, steps=2, batch_size=2, eval_every=1, keep_best=True, patience=2, min_delta=1e3)
    reports = train_masks(model, make_rows(), settings, way=way, validation=validation)
    assert [report.loss for report in reports] == losses
    assert all(torch.equal(scores, scores_of(quiet)[name]) for name, scores in scores_of(model).items())
    for step, then in ((1, short), (2, quiet)):
        assert torch.equal(found[step].loss_sums, evaluate(then, held_out, batch_size=3, way=way).loss_sums)
    Best(tmp_path).put(model, validation.standing.best)
    best = {1: short, 2: quiet}[validation.standing.best]
    for name, layer in masked_modules(model).items():
        assert torch.equal(layer.mask(), masked_modules(best)[name].mask())


@pytest.mark.parametrize("way", ["plain", *WAYS])
def test_a_stopped_run_goes_on_bit_for_bit(way, tmp_path):
    changes = {"scores_dtype": "bfloat16"}
    settings = TrainConfig(lr=1e-2, steps=4, batch_size=2, accumulation=2, seed=3, moments="8bit")
    rows, straight, resumed = make_rows(10), mixture(**changes), mixture(**changes)
    expected = train_masks(straight, rows, settings, way=way)

    def stop(report):
        if report.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Stopped):
        train_masks(mixture(**changes), rows, settings, way=way, on_step=stop, saver=Saver(tmp_path, math.inf))
    checkpoint, _ = newest_checkpoint(tmp_path)
    assert checkpoint.step == 2
    reports = train_masks(resumed, rows, settings, way=way, saver=Saver(tmp_path, math.inf, checkpoint))
    assert [report.loss for report in reports] == [report.loss for report in expected]
    wanted = straight.state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in resumed.state_dict().items())


def test_gradient_checkpointing_changes_no_bit():
    one, other = (train("plain", mixture("qwen3_moe"), gradient_checkpointing=asked) for asked in (False, True))
    assert_same_training(one, other, tolerance=0)


def test_a_routers_auxiliary_loss_plays_no_part():
    """The router is frozen, and the loss is that of the tokens only."""
    quiet = train("plain", mixture("olmoe"))
    for way in ("plain", *WAYS):
        asked = {"output_router_logits": True, "router_aux_loss_coef": 100.0}
        assert_same_training(
            train(way, mixture("olmoe", changes=asked)), quiet, tolerance=0 if way == "plain" else TOLERANCE[way]
        )


@pytest.mark.parametrize("moments", ["float32", "8bit"])
def test_an_expert_that_sees_no_token_goes_on_by_its_moments_alone(moments):
    """From the second step on, no token is routed to expert 0."""
    rows, runs = make_rows(), {}
    constant = {"schedule": "constant", "warmup_ratio": 0.0, "betas": (0.9, 0.999)}
    settings = TrainConfig(lr=1e-3, steps=3, batch_size=2, moments=moments, **constant)
    for way in ("plain", *BY_LAYERS):
        model, seen = mixture(), []

        def after_step(report, model=model, seen=seen):
            seen.append({name: layer.scores.detach()[0].clone() for name, layer in experts_of(model).items()})
            for layer in model.model.layers:
                layer.mlp.router.bias.data[0] = -1e4

        reports = train_masks(model, rows, settings, way=way, on_step=after_step)
        runs[way] = model, [report.loss for report in reports]
        one, two, three = seen
        for name, first in one.items():
            steps = (two[name] - first).abs().max(), (three[name] - two[name]).abs().max()
            assert 0 < steps[1] < steps[0], name  # Adam's moments decay
    if moments == "float32":
        for way in BY_LAYERS:
            assert_same_training(runs[way], runs["plain"])
    assert_same_training(runs["layerwise"], runs["resident"], tolerance=0)


# ---------------------------------------------------------------------------------------------- a quantised base


@pytest.mark.parametrize("masked", [False, True], ids=["exact masked layers", "masked too"])
@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_every_way_gives_the_plain_update_on_a_quantised_base(kind, masked):
    def make():
        return quantize_model(mixture(kind, layers=[1, 2]), "nf4", masked=masked)

    codes = quantized_weights(make())
    experts = {f"model.layers.{i}.mlp.experts.{part}_proj" for i in range(3) for part in ("gate_up", "down")}
    assert experts & codes.keys() == (experts if masked else {name for name in experts if ".0." in name})
    plain = train("plain", make(), steps=2, accumulation=2)
    for way in ("resident", "quantized", "layerwise"):
        assert_same_training(train(way, make(), steps=2, accumulation=2), plain)
    exact = train("plain", mixture(kind, layers=[1, 2]), steps=2, accumulation=2)
    assert exact[1] != pytest.approx(plain[1], abs=1e-5)


def test_clipping_over_codes():
    runs = [
        train(way, quantize_model(mixture(), "int8", masked=True), max_grad_norm=1e-3) for way in ("plain", "quantized")
    ]
    assert_same_training(*runs)
