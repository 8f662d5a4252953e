"""What mixtures of experts need, against a simulation of the engines at the published widths."""

import pytest

from benchmarks.memory.simulated_step import simulate_step
from mft.memory.estimate import estimate
from mft.memory.shapes import known_config, shape_from_config
from mft.memory.workload import Workload

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def of_two_layers(name):
    """The published widths; two layers and few words, which make a simulation short."""
    config = known_config(name)
    types = {"layer_types": config["layer_types"][:2]} if "layer_types" in config else {}
    words = {"vocab_size": 2048} | dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0)
    return config | words | types | {"num_hidden_layers": 2}


def assert_as_simulated(config, workload, tolerance):
    expected, found = estimate(shape_from_config(config), workload), simulate_step(config, workload, steps=2)
    assert expected.device_peak == pytest.approx(found.device_peak, rel=tolerance)
    assert expected.host_peak == pytest.approx(found.host_peak, rel=tolerance)
    return expected


@pytest.mark.parametrize(
    ("name", "way", "changes"),
    [
        ("mixtral-8x7b", "layerwise", {"sequence": 2048, "layers": (1,)}),  # two layers' weights are the most
        ("qwen3-30b-a3b", "resident", {"sequence": 4096}),
        ("gpt-oss-20b", "layerwise", {"sequence": 2048, "micro_batch": 2}),
        ("gpt-oss-20b", "plain", {"sequence": 4096}),
    ],
)
def test_masked_attention_beside_frozen_experts(name, way, changes):
    workload = Workload(memory=way, accumulation=2, target_modules=ATTENTION, **changes)
    assert_as_simulated(of_two_layers(name), workload, tolerance=0.01)


def test_experts_stay_exact_in_a_base_in_few_bits():
    workload = Workload(memory="quantized", layers=(1,), target_modules=ATTENTION, sequence=512, accumulation=2)
    config = of_two_layers("qwen3-30b-a3b")
    found = assert_as_simulated(config, workload, tolerance=0.01)
    shape = shape_from_config(config)
    assert found.quantized == 4
    assert found.device["weights"] > 2 * sum(2 * e * n * k for e, n, k in shape.experts.values())
