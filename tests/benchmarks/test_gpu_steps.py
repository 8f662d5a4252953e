"""What the GPU suite times beside single products: layers at few tokens, an optimiser step's parts."""

import pytest
import torch

pytest.importorskip("triton", reason="the GPU suite measures Triton kernels")

from gpu_records import CEILINGS

from benchmarks.gpu import competitors, device, host, tables, updates
from benchmarks.gpu.cases import CUDA, DENSE, DRY_SHAPE, FUSED, Case
from benchmarks.gpu.journal import MEASURED
from mft_kernels import reference, reference_step


class OnHost(device.Interpreter):
    """The dry run's device, without an emulator: what needs a kernel is given the reference."""

    def __init__(self):
        self.without = {CUDA: "its library is not built"}


@pytest.fixture
def inputs():
    return competitors.Inputs(OnHost())


@pytest.fixture
def by_the_reference(monkeypatch):
    """Triton's functions, computed by the reference."""
    monkeypatch.setattr(updates.score_step, "score_step", reference_step.score_step)
    monkeypatch.setattr(updates.ops, "accumulate_product", reference.accumulate_product)


def at_host(inputs):
    return host.time_host(Case("host", *DRY_SHAPE, 3), inputs, OnHost())


def update(detail, inputs):
    return updates.time_update(Case("updates", *DRY_SHAPE, 3, detail), inputs, OnHost(), CEILINGS)


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


def test_the_parts_of_an_optimiser_step_are_timed(inputs, by_the_reference):
    steps = update("score_step", inputs)
    assert set(steps["samples"]) == {"int16, 8-bit, Triton", "fp32, exact, Triton", updates.TORCH_ADAMW}
    assert set(update("accumulate_product", inputs)["samples"]) == {DENSE, FUSED}
    held = update("held", inputs)
    assert set(held["samples"]) == {DENSE, updates.HELD, updates.UNHELD}
    assert all(fields["failures"] == {} for fields in (steps, held))
    assert steps["left_out"] == {CUDA: "its library is not built"}
    assert "| score_step, 24 x 40 | fp32, exact, Triton |" in tables.markdown(
        [document("updates", steps, "score_step")]
    )


def test_a_step_or_an_accumulation_that_is_wrong_is_not_timed(inputs, by_the_reference, monkeypatch):
    def lazy(scores, grad, weight, exp_avg, exp_avg_sq, *rest, **options):  # its moments stay as they are
        copies = exp_avg.clone(), exp_avg_sq.clone()
        return reference_step.score_step(scores, grad, weight, *copies, *rest, **options)

    def twice(out, grad, x):
        out.add_(grad.T.float() @ x.float(), alpha=2)

    monkeypatch.setattr(updates.score_step, "score_step", lazy)
    failures = update("score_step", inputs)["failures"]
    assert failures.keys() == {"int16, 8-bit, Triton", "fp32, exact, Triton"}
    assert "of the new scores differ" in failures["fp32, exact, Triton"]
    monkeypatch.setattr(updates.ops, "accumulate_product", twice)
    assert "wrong: 1 from the eager form" in update("accumulate_product", inputs)["failures"][FUSED]
    monkeypatch.setattr(updates, "masked_linear_held", lambda x, weight, packed, **_: x @ weight.T)
    assert "from the eager form" in update("held", inputs)["failures"][updates.HELD]


def document(what, fields, detail="", m=0):
    case = {"what": what, "n": DRY_SHAPE[0], "k": DRY_SHAPE[1], "m": m, "detail": detail, "status": MEASURED, **fields}
    environment = {"device": "none", "dry_run": True}
    return {"what": what, "environment": environment, "ceilings": CEILINGS, "goals": [], "cases": [case]}
