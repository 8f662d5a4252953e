"""Shapes that tests of the memory estimate share: LLaMA2-7B, 70B, and LLaMA2-7B at an eighth of its width."""

import pytest

from mft.memory.estimate import estimate
from mft.memory.shapes import known_config, shape_from_config

# LLaMA2-7B's proportions at an eighth of its width. Two of the four layers can be masked, between two that are not.
SMALL = known_config("llama2-7b") | {
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "vocab_size": 4096,
}
SEVEN = shape_from_config(known_config("llama2-7b"), "llama2-7b")
SEVENTY = shape_from_config(known_config("llama2-70b"), "llama2-70b")
LOCAL = (4, 5, 6, 7)


def assert_as_simulated(config, workload, tolerance=0.05):
    """Assert that the estimate is that of a simulation of the engines; return it."""
    from benchmarks.memory.simulated_step import simulate_step  # slow to import, and not every test needs it

    steps = 2 if workload.memory in ("plain", "in_place") else 1  # the second step has moments
    expected, found = estimate(shape_from_config(config), workload), simulate_step(config, workload, steps=steps)
    assert expected.device_peak == pytest.approx(found.device_peak, rel=tolerance)
    assert expected.host_peak == pytest.approx(found.host_peak, rel=tolerance)
    return expected
