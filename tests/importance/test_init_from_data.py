"""Scores that begin from data: by hand, in every way of running, on quantised bases, on experts and under PEFT."""

from types import SimpleNamespace

import pytest
import torch
from peft import get_peft_model
from tiny import make_llama, make_rows
from tiny_mixtures import mixture
from transformers import GPT2Config, GPT2LMHeadModel

import mft.engines.mode
import mft.importance.importance
from mft.config import MaskConfig
from mft.engines.offload import Mover
from mft.importance.importance import importance
from mft.importance.initial_scores import drawn, init_from_data, initialise_scores, mask_from_data
from mft.importance.peft_init import init_adapter_from_data
from mft.masks.convert import mask_model, masked_modules
from mft.masks.peft import MaskPeftConfig, to_masked_model
from mft.masks.quantize import quantize_model

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # PEFT calls it

LAYERS = {"target_modules": ["gate_proj", "o_proj"], "layers_to_transform": [1, 3]}
FREE = {"mode": "value", "threshold": 0.0, "init": "wanda", "calibration_rows": 6}
ROWS = make_rows(9)


def scores_of(model):
    return {name: module.scores.detach().clone() for name, module in masked_modules(model).items()}


def assert_same(one, other, exact=True):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]) if exact else torch.allclose(one[name], other[name], rtol=1e-4), name


@pytest.mark.parametrize(("mode", "threshold"), [("value", 0.0), ("value", -0.5), ("magnitude", 0.25)])
def test_scores_rise_from_the_threshold_with_wanda_and_keep_everything(mode, threshold):
    mask = MaskConfig(**LAYERS | FREE | {"mode": mode, "threshold": threshold, "seed": 3})
    model = mask_from_data(make_llama(), mask, ROWS)
    expected = importance(make_llama(), masked_modules(model), "wanda", ROWS, rows=6, seed=3)
    for name, module in masked_modules(model).items():
        above = module.scores - threshold
        assert above.square().mean().sqrt().item() == pytest.approx(0.02, rel=1e-4)
        scaled = expected[name] * (0.02 / expected[name].square().mean().sqrt())
        torch.testing.assert_close(above, scaled, rtol=1e-4, atol=1e-7)
        assert module.mask().all()


def test_with_a_keep_ratio_they_begin_as_initialise_scores_has_them():
    mask = MaskConfig(**LAYERS | FREE | {"threshold": None, "keep_ratio": 0.7})
    model = mask_from_data(make_llama(), mask, ROWS)
    other = mask_model(make_llama(), drawn(mask))
    assert_same(scores_of(model), scores_of(initialise_scores(other, "wanda", ROWS, rows=6)))


@pytest.fixture(scope="module")
def plain():
    return scores_of(mask_from_data(make_llama(), MaskConfig(**LAYERS | FREE), ROWS))


@pytest.mark.parametrize("way", ["resident", "layerwise"])
def test_every_way_begins_alike(way, plain, monkeypatch):
    """The device has its own memory."""
    monkeypatch.setattr(mft.engines.mode, "Mover", lambda device: Mover(device, separate=True))
    monkeypatch.setattr(mft.importance.importance, "run_decoder", None)  # the whole model must not run
    assert_same(scores_of(mask_from_data(make_llama(), MaskConfig(**LAYERS | FREE), ROWS, way=way)), plain, exact=False)


def test_a_quantised_base_begins_by_what_it_computes(plain):
    mask = MaskConfig(**LAYERS | FREE)
    found = []
    for way in ("plain", "quantized"):
        model = quantize_model(mask_model(make_llama(), drawn(mask)), "int8", masked=True)
        found.append(scores_of(init_from_data(model, mask, ROWS, way=way)))
    assert_same(*found, exact=False)
    assert all(torch.allclose(found[0][name], scores, atol=1e-3) for name, scores in plain.items())
    assert any(not torch.equal(found[0][name], scores) for name, scores in plain.items())


def test_all_processes_begin_as_the_first(plain):
    def other_first(norms):
        return [{name: norm * torch.arange(1, len(norm) + 1) for name, norm in norms.items()}, norms]

    mask = MaskConfig(**LAYERS | FREE)
    model = mask_from_data(make_llama(), mask, ROWS, processes=SimpleNamespace(gather=other_first))
    name = "model.layers.1.mlp.gate_proj"
    ratio = scores_of(model)[name] / plain[name]
    torch.testing.assert_close(ratio / ratio[:, :1], torch.arange(1.0, 33).expand_as(ratio), rtol=1e-4, atol=0)


@pytest.mark.parametrize("kind", ["Olmoe", "GptOss"])
def test_experts_begin_each_by_its_own_rows(kind):
    """GPT-OSS stores the transpose."""
    asked = {"target_parameters": ["experts.gate_up_proj"]} | FREE
    models = [mask_from_data(mixture(kind), MaskConfig(**asked), ROWS, way=way) for way in ("plain", "layerwise")]
    assert_same(*map(scores_of, models), exact=False)
    expected = importance(mixture(kind), masked_modules(models[0]), "wanda", ROWS, rows=6)
    for name, module in masked_modules(models[0]).items():
        assert module.mask().all()
        ours = module.scores.mT if kind == "GptOss" else module.scores
        scaled = expected[name] * (0.02 / expected[name].square().mean((1, 2), keepdim=True).sqrt())
        torch.testing.assert_close(ours.detach(), scaled, rtol=1e-4, atol=1e-7)


def test_an_expert_that_no_row_reached_begins_by_its_weights():
    """With 32 experts and two per token, one row of twelve tokens reaches at most 24."""
    mask = MaskConfig(target_parameters=["experts.gate_up_proj"], **FREE | {"calibration_rows": 1})
    model = mask_from_data(mixture("Olmoe", num_experts=32), mask, ROWS)
    for module in masked_modules(model).values():
        torch.testing.assert_close(
            module.scores.square().mean((1, 2)).sqrt(), torch.full((32,), 0.02), rtol=1e-3, atol=0
        )
        size = module.weight.abs() / module.weight.square().mean((1, 2), keepdim=True).sqrt()
        assert torch.isclose(module.scores, 0.02 * size, rtol=1e-4).all((1, 2)).sum() >= 8


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=2, n_positions=32)).eval()


@pytest.mark.parametrize(
    ("make", "layers"),
    [
        (make_llama, LAYERS),
        (gpt2, {"target_modules": ["c_attn", "c_proj"]}),
        (lambda: mixture("GptOss"), {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}),
    ],
    ids=["Linear", "Conv1D", "experts"],
)
def test_an_adapter_begins_as_a_masked_model(make, layers):
    mask = MaskConfig(**layers | FREE)
    model = get_peft_model(make(), MaskPeftConfig(**vars(drawn(mask)), task_type="CAUSAL_LM"))
    adapter = to_masked_model(init_adapter_from_data(model, mask, ROWS))
    assert_same(scores_of(adapter), scores_of(mask_from_data(make(), mask, ROWS)), exact=False)
