"""What the GPU suite times beside single products: layers at few tokens."""

import pytest
import torch

pytest.importorskip("triton", reason="the GPU suite measures Triton kernels")

from gpu_records import CEILINGS

from benchmarks.gpu import competitors, device, host, tables
from benchmarks.gpu.cases import CUDA, DRY_SHAPE, Case
from benchmarks.gpu.journal import MEASURED


class OnHost(device.Interpreter):
    """The dry run's device, without an emulator: what needs a kernel is given the reference."""

    def __init__(self):
        self.without = {CUDA: "its library is not built"}


@pytest.fixture
def inputs():
    return competitors.Inputs(OnHost())


def at_host(inputs):
    return host.time_host(Case("host", *DRY_SHAPE, 3), inputs, OnHost())


def test_layer_op_and_linear_are_timed_eager_and_in_a_graph(inputs):
    fields = at_host(inputs)
    assert fields["failures"] == {}
    names = (host.DENSE_LAYER, host.LAYER, host.HELD_LAYER, host.OP)
    assert set(fields["samples"]) == {*names, *(name + host.IN_GRAPH for name in names)}
    text = tables.markdown([document("host", fields, m=3)])
    assert "| 24 x 40 | 3 | " in text
    assert "No figure below was measured on a GPU" in text


def test_a_layer_that_computes_something_else_is_not_timed(inputs, monkeypatch):
    monkeypatch.setitem(host._MAKERS, host.OP, host.dense_layer)  # unmasked
    fields = at_host(inputs)
    assert fields["failures"].keys() == {host.OP}
    assert "from the eager form" in fields["failures"][host.OP]
    assert not [name for name in fields["samples"] if name.startswith("masked_linear")]


def test_by_the_clock_what_the_host_needs_counts(monkeypatch):
    """A caller who waits 2 ms for each of 50 calls, on a card whose events say nothing of it."""
    now = iter(range(10**6))
    monkeypatch.setattr(device.time, "perf_counter", lambda: next(now) * 0.1)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    calls: list[int] = []
    timer = device.Gpu.clock(None, calls.append, 3)
    assert (timer.method, timer.calls) == ("clock", 50)
    assert timer.replay() == pytest.approx(2.0)
    assert calls[:4] == [0, 1, 2, 0]
    assert len(calls) == 100


def document(what, fields, detail="", m=0):
    case = {"what": what, "n": DRY_SHAPE[0], "k": DRY_SHAPE[1], "m": m, "detail": detail, "status": MEASURED, **fields}
    environment = {"device": "none", "dry_run": True}
    return {"what": what, "environment": environment, "ceilings": CEILINGS, "goals": [], "cases": [case]}
