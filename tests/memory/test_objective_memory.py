"""Memory that objectives add to a step, compared with a simulation of the engines."""

from dataclasses import replace

import pytest
from known_shapes import SEVEN, SMALL, assert_as_simulated

from mft.memory.estimate import estimate
from mft.memory.workload import Workload
from mft.objectives import chunks


@pytest.mark.parametrize(("way", "objective"), [("plain", "dpo"), ("resident", "kl"), ("layerwise", "kl")])
def test_objectives_of_the_base_are_as_simulated(way, objective, monkeypatch):
    """The vocabulary is so large that the loss is the peak; fp32 takes as many rows at once as on a GPU."""
    monkeypatch.setattr(chunks, "rows_at_once", lambda logits: len(logits))
    config = SMALL | {"vocab_size": 64000}
    workload = Workload(memory=way, layers=(1, 2), sequence=256, accumulation=2, objective=objective)
    assert assert_as_simulated(config, workload).phase == "loss"


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
