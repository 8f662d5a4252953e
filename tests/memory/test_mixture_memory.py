"""Memory of mixtures of experts, compared with a simulation of the engines at the published widths."""

from dataclasses import replace

import pytest
from known_shapes import assert_as_simulated

from mft.memory.estimate import estimate
from mft.memory.shapes import known_config, shape_from_config
from mft.memory.workload import Workload

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def of_two_layers(name):
    """Return the published widths with two layers, few experts and few tokens, for a short simulation."""
    config = known_config(name)
    types = {"layer_types": config["layer_types"][:2]} if "layer_types" in config else {}
    few = {"vocab_size": 2048} | dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0)
    experts = {key: 8 for key in ("num_experts", "num_local_experts") if key in config}
    return config | few | experts | types | {"num_hidden_layers": 2}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "way", "changes"),
    [
        ("mixtral-8x7b", "layerwise", {"layers": (1,)}),
        ("qwen3-30b-a3b", "resident", {"scores": "int16", "moments": "8bit", "sequence": 3072}),
        ("gpt-oss-20b", "plain", {"sequence": 3072}),
        ("gpt-oss-20b", "layerwise", {"processes": 2, "accumulation": 4, "sequence": 128}),  # the peak is in the update
        ("gpt-oss-20b", "layerwise", {"micro_batch": 2, "scores": "int16", "moments": "8bit"}),
    ],
)
def test_masked_experts_are_as_simulated(name, way, changes):
    workload = Workload(**{"memory": way, "accumulation": 2, "sequence": 2048} | changes)
    tolerance = 0.05 if way == "plain" else 0.01  # the simulation lacks plain's masks, which an op keeps
    assert_as_simulated(of_two_layers(name), workload, tolerance)


@pytest.mark.parametrize(
    ("name", "way", "changes"),
    [
        ("mixtral-8x7b", "layerwise", {"layers": (1,)}),  # the peak is two layers' weights
        ("qwen3-30b-a3b", "resident", {}),
    ],
)
def test_masked_attention_beside_frozen_experts(name, way, changes):
    workload = Workload(**{"memory": way, "accumulation": 2, "sequence": 2048, "target_modules": ATTENTION} | changes)
    assert_as_simulated(of_two_layers(name), workload, tolerance=0.01)


@pytest.mark.parametrize(
    ("name", "way", "masked", "quantize_masked"),
    [
        ("qwen3-30b-a3b", "quantized", ("o_proj",), False),
        ("gpt-oss-20b", "quantized", None, True),
        ("mixtral-8x7b", "layerwise", ("experts.down_proj",), False),
    ],
    ids=["frozen", "masked", "one of two"],
)
def test_experts_in_few_bits_are_dense_a_product_at_a_time(name, way, masked, quantize_masked):
    """Short rows and small states, so that the dense weights matter."""
    workload = Workload(way, target_modules=masked, sequence=128, accumulation=2, scores="int16", moments="8bit")
    coded = replace(workload, quantization="nf4", quantize_masked=quantize_masked)
    found = assert_as_simulated(of_two_layers(name), coded, tolerance=0.01)
    assert found.quantized == {"qwen3-30b-a3b": 10, "gpt-oss-20b": 12, "mixtral-8x7b": 10}[name]


def test_seconds_count_the_experts_that_a_token_is_routed_to_or_reading_all_that_see_one():
    shape = shape_from_config(known_config("mixtral-8x7b"))
    work = Workload("resident", sequence=4096, micro_batch=8, accumulation=1)
    one, two = (estimate(replace(shape, mixture=replace(shape.mixture, top_k=k)), work).seconds for k in (1, 2))
    an_expert = sum(n * k for _, n, k in shape.experts.values())
    products = 4 * shape.layers  # up, up again, down, and the scores' gradient
    assert two - one == pytest.approx(products * 2 * work.tokens * an_expert / 150e12)
    few = [estimate(shape, replace(work, micro_batch=1, sequence=tokens)).seconds for tokens in (64, 128)]
    assert few[1] == pytest.approx(few[0], rel=0.02)
    read = (products + shape.layers) * 8 * an_expert * 2 / 0.8e12
    assert few[0] > read
