"""A masked mixture, with the experts in one parameter each: all ways give the plain update. test_resume.py stops it."""

import pytest
import torch
from test_ways import assert_same_training, train
from tiny import make_rows
from tiny_architectures import MIXTURES
from tiny_ways import BY_LAYERS, TOLERANCE, WAYS, scores_of
from tiny_ways import masked_mixture as mixture

from mft.config import TrainConfig
from mft.masks.convert import masked_modules
from mft.masks.quantize import quantize_model
from mft.models.codes.weight import quantized_weights
from mft.objectives.dpo import DPO
from mft.objectives.kl import KL
from mft.training.loop import train_masks
from mft_kernels import MaskedGroupedLinear

# Run on the CPU as if it were a device with its own memory.
pytestmark = [pytest.mark.usefixtures("separate"), pytest.mark.parametrize("separate", [True], indirect=True)]


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


@pytest.mark.parametrize("scores_dtype", ["bfloat16", "int16"])
def test_scores_and_moments_in_few_bits_learn_the_same_bit_for_bit(scores_dtype):
    one, other = (train(way, mixture(scores_dtype=scores_dtype), moments="8bit", steps=4) for way in BY_LAYERS)
    assert one[1] == other[1]
    before = scores_of(mixture(scores_dtype=scores_dtype))
    for name, scores in scores_of(one[0]).items():
        assert torch.equal(scores, scores_of(other[0])[name])
        assert not torch.equal(scores, before[name])


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
        return quantize_model(mixture(kind, layers_to_transform=[1, 2]), "nf4", masked=masked)

    codes = quantized_weights(make())
    experts = {f"model.layers.{i}.mlp.experts.{part}_proj" for i in range(3) for part in ("gate_up", "down")}
    assert experts & codes.keys() == (experts if masked else {name for name in experts if ".0." in name})
    plain = train("plain", make(), steps=2, accumulation=2)
    for way in ("resident", "quantized", "layerwise"):
        assert_same_training(train(way, make(), steps=2, accumulation=2), plain)
    exact = train("plain", mixture(kind, layers_to_transform=[1, 2]), steps=2, accumulation=2)
    assert exact[1] != pytest.approx(plain[1], abs=1e-5)
