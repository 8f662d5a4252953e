"""Memory that objectives add to a step, compared with a simulation of the engines."""

from dataclasses import replace

import pytest
from known_shapes import SEVEN, SMALL

from benchmarks.memory.simulated_step import simulate_step
from mft.config import OBJECTIVES
from mft.memory import activations
from mft.memory.estimate import estimate
from mft.memory.shapes import shape_from_config
from mft.memory.workload import Workload
from mft.objectives import chunks


@pytest.mark.parametrize(("way", "objective"), [("plain", "dpo"), ("resident", "kl"), ("layerwise", "kl")])
def test_objectives_of_the_base_are_as_simulated(way, objective, monkeypatch):
    """The vocabulary is so large that the loss is the peak; fp32 takes as many rows at once as on a GPU."""
    monkeypatch.setattr(chunks, "rows_at_once", lambda logits: len(logits))
    config = SMALL | {"vocab_size": 64000}
    workload = Workload(memory=way, layers=(1, 2), sequence=256, accumulation=2, objective=objective)
    expected, found = estimate(shape_from_config(config), workload), simulate_step(config, workload, steps=2)
    assert expected.phase == "loss"
    assert expected.device_peak == pytest.approx(found.device_peak, rel=0.05)
    assert expected.host_peak == pytest.approx(found.host_peak, rel=0.05)


def test_no_objective_has_a_second_copy_of_the_weights():
    for way in ("plain", "resident", "layerwise"):
        plain = Workload(memory=way, sequence=512, accumulation=2)
        for objective in ("kl", "dpo"):
            one, other = (estimate(SEVEN, work) for work in (plain, replace(plain, objective=objective)))
            assert other.device["weights"] == one.device["weights"]
            assert other.host.get("weights") == one.host.get("weights")
            assert 0 <= other.device_peak - one.device_peak < 0.3e9


def test_a_teachers_weights_count():
    workload = Workload(memory="resident", objective="distill", teacher_bytes=10**9)
    assert estimate(SEVEN, workload).device["teacher"] == 10**9


def test_rows_in_fp32_are_counted_as_they_are():
    assert (activations.ROWS, set(activations._LOGITS)) == (chunks.ROWS, set(OBJECTIVES))
