"""A step's time by kind of operator: each operator has one kind, and the kinds add up to the time."""

import time

import torch

from benchmarks.step_profile import profile_step


def test_the_kinds_of_a_profile_add_up_to_its_time():
    a = torch.ones(600, 600)
    start = time.perf_counter()
    spent = profile_step(lambda: [a @ a for _ in range(20)])
    took = (time.perf_counter() - start) * 1e3
    assert 0 < spent["products"] < sum(spent.values()) < took
    assert spent["attention"] == spent["optimiser"] == 0
