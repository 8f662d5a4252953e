"""A step's time by kind of operator: each operator has one kind, and the kinds add up to the time."""

import time
from types import SimpleNamespace

import torch

from benchmarks.step_profile import REST, kind_of, profile_step


def test_an_operator_belongs_to_the_nearest_kind_above_it():
    def event(name, parent=None):
        return SimpleNamespace(name=name, cpu_parent=parent)

    optimiser = event("Optimizer.step#AdamW.step")
    assert kind_of(event("aten::mul", optimiser)) == "optimiser"
    assert kind_of(event("aten::mm", event("aten::linear"))) == "products"
    assert kind_of(event("aten::add")) == REST


def test_the_kinds_of_a_profile_add_up_to_its_time():
    a = torch.ones(600, 600)
    start = time.perf_counter()
    spent = profile_step(lambda: [a @ a for _ in range(20)])
    took = (time.perf_counter() - start) * 1e3
    assert 0 < spent["products"] < sum(spent.values()) < took
    assert spent["attention"] == spent["optimiser"] == 0
