"""What the GPU suite times beside single products: layers at few tokens, an optimiser step's parts, whole steps."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="the GPU suite measures Triton kernels")

from gpu_records import CEILINGS

from benchmarks.gpu import cases, competitors, device, host, tables, train, updates
from benchmarks.gpu.cases import CUDA, DENSE, DRY_SHAPE, FUSED, Case
from benchmarks.gpu.journal import FAILED, MEASURED, NOT_MEASURED
from mft_kernels import reference
from mft_kernels.reference import step as reference_step

ROOT = Path(__file__).resolve().parents[3]


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
    assert fields["failures"].keys() == {host.OP, host.OP + host.IN_GRAPH}
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


# ---------------------------------------------------------------------------------------------- whole steps


def test_every_way_of_running_is_trained_without_datasets():
    """On a machine that lacks the package, and one more that only the verbs need."""
    code = (
        "import sys; sys.modules['datasets'] = sys.modules['peft'] = None\n"
        "import torch; torch.set_num_threads(1)\n"
        "import warnings; warnings.simplefilter('error')\n"
        "from benchmarks.gpu import cases, device, train\n"
        "class OnHost(device.Interpreter):\n"
        "    def __init__(self): self.without = {}\n"
        "for case in cases.plan(['train'], [cases.DRY_SHAPE], [cases.DRY_TOKENS]):\n"
        "    status, fields = train.time_train(case, OnHost())\n"
        "    print(case.detail, status, fields.get('estimate', fields))\n"
    )
    environment = {"PATH": "", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert len(lines) == 12
    assert all(" measured {'seconds': " in line for line in lines), run.stdout


def test_a_model_that_learns_something_else_is_not_timed(monkeypatch):
    case = Case("train", m=8, detail="a SmolLM2 layer, plain")
    train._losses_by_the_reference.cache_clear()
    monkeypatch.setattr(train, "_losses_by_the_reference", lambda *_: [4.0, 4.0])
    calls = iter([4.0, 4.2])
    monkeypatch.setattr(train.Steps, "__init__", lambda self, *_: None)
    monkeypatch.setattr(train.Steps, "__call__", lambda self: next(calls, 4.0))
    monkeypatch.setattr(train.Steps, "close", lambda self: None)
    status, fields = train.time_train(case, OnHost())
    assert status == FAILED
    assert fields["reason"].startswith("wrong: losses [4.0, 4.2]")
    calls = iter([4.0, 4.04])
    assert train.time_train(case, OnHost())[0] == MEASURED


def test_without_transformers_whole_steps_say_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    train._losses_by_the_reference.cache_clear()
    status, fields = train.time_train(Case("train", m=8, detail="SmolLM2-135M, layerwise"), OnHost())
    assert status == NOT_MEASURED
    assert fields["reason"].startswith("without transformers")


def test_the_sizes_are_the_real_models():
    layer, whole = train.config_of("a SmolLM2 layer"), train.config_of("SmolLM2-135M")
    assert (layer["hidden_size"], layer["num_hidden_layers"], whole["num_hidden_layers"]) == (576, 1, 30)
    assert {case.detail.rsplit(", ", 1)[1] for case in cases.plan(["train"], [], [2048])} == set(train.WAYS)
