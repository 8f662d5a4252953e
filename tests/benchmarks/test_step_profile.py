"""A step's time by kind of operator: each operator has one, and the kinds add up to the time."""

import time
from types import SimpleNamespace

import torch
from tiny import make_llama, make_rows

from benchmarks.bench_demo import ProfilingRecorder
from benchmarks.step_profile import REST, kind_of, profile_step
from mft.config import TrainConfig
from mft.evaluation.evaluate import evaluate
from mft.training.loop import finetune


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


def test_the_demos_phases_are_profiled_by_what_they_do():
    recorder, rows, model, train = ProfilingRecorder(), make_rows(8), make_llama(), TrainConfig(steps=13)
    begin = time.perf_counter()
    with recorder.training("full fine-tune", rows, train) as on_step:
        finetune(model, rows, train, on_step=on_step)
    took = time.perf_counter() - begin
    assert len(recorder.curves["full fine-tune"]) == 13
    assert all(recorder.seconds["training"][kind] > 0 for kind in ("products", "attention", "optimiser", "loss"))
    assert 0 < sum(recorder.seconds["training"].values()) < took - recorder.profiling
    assert sum(recorder.seconds["evaluating"].values()) == 0
    loss = recorder.evaluate("test", model, rows, batch_size=1).loss
    assert loss == evaluate(model, rows, batch_size=1).loss
    assert recorder.seconds["evaluating"]["products"] > 0
    assert recorder.seconds["evaluating"]["optimiser"] == 0
