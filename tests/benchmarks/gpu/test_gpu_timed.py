"""The parts that the GPU suite times: products in every way, layers at few tokens, work once per step, whole steps."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the GPU suite measures Triton kernels")

from gpu_records import CEILINGS, documents_of, on_host

from benchmarks.gpu import once_a_step, products, report, timing, train, ways
from benchmarks.gpu.cases import DENSE, DRY_SHAPE, EAGER, FUSED, HELD, LAYER, Case

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def bench():
    return timing.Bench(on_host(), CEILINGS)


def timed(what, bench, *competitors):
    """Compare these competitors on one of the products."""
    case = Case(what, *DRY_SHAPE, 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "competitors", lambda case: competitors)
        return products.time_product(case, bench)


def at_host(bench):
    return products.time_host(Case("host", *DRY_SHAPE, 3), bench)


def steps(bench):
    return once_a_step.time_score_step(Case("score_step", *DRY_SHAPE), bench)


def test_layer_op_and_linear_are_timed_eager_and_in_a_graph(bench):
    fields = at_host(bench)
    assert fields["failures"] == {}
    names = (products.DENSE_LAYER, LAYER, HELD, products.OP)
    assert set(fields["samples"]) == {*names, *(name + products.IN_GRAPH for name in names)}
    case = {"what": "host", "n": 24, "k": 40, "m": 3, "detail": "", "status": "measured"}
    text = report.text(documents_of(case | fields, environment={"device": "none", "dry_run": True}))
    assert "### host 24 x 40" in text
    assert "| M = 3 | " in text
    assert "No figure below was measured on a GPU" in text


@pytest.mark.parametrize("what", ["forward", "d_x", "d_scores", "accumulate", "accumulate_product", "step"])
def test_products_are_checked_and_timed_by_every_way(what, bench):
    names = [DENSE, FUSED] if what == "accumulate_product" else [DENSE, EAGER, FUSED, "fused, packed", "auto, packed"]
    fields = timed(what, bench, *names)
    assert fields["failures"] == {}
    assert list(fields["samples"]) == names
    assert fields["samples"][FUSED]["floor_ms"] > 0
    assert "percent_of_cublas" in fields["samples"][FUSED]


def test_a_way_that_is_wrong_is_not_timed(bench, monkeypatch):
    def twice(self, o, weight, signs):
        return o.sums.add_(o.grad.T.float() @ o.x.float(), alpha=2)

    monkeypatch.setattr(ways.Ours, "_add", twice)
    assert "wrong: 1 from the eager form" in timed("accumulate_product", bench, DENSE, FUSED)["failures"][FUSED]
    monkeypatch.setattr(products, "held_layer", ways.dense_layer)
    assert {HELD, HELD + products.IN_GRAPH} == at_host(bench)["failures"].keys()


def test_steps_of_both_schemes_are_timed_beside_adam(bench):
    fields = steps(bench)
    assert set(fields["samples"]) == {"int16, 8-bit, Triton", "fp32, exact, Triton", once_a_step.TORCH_ADAMW}
    assert (fields["failures"], fields["left_out"]) == ({}, {})


# ---------------------------------------------------------------------------------------------- whole steps


@pytest.mark.slow
def test_every_way_of_running_is_trained_without_datasets():
    """Works on a machine that lacks the package datasets, and one more that only the verbs need."""
    code = (
        "import sys; sys.modules['datasets'] = sys.modules['peft'] = None\n"
        "import torch; torch.set_num_threads(1)\n"
        "import warnings; warnings.simplefilter('error')\n"
        "from gpu_records import on_host\n"
        "from benchmarks.gpu import cases, timing, train\n"
        "bench = timing.Bench(on_host(without={}), {})\n"
        "for case in cases.plan(['train'], [cases.DRY_SHAPE], [cases.DRY_TOKENS]):\n"
        "    print(case.detail, train.time_train(case, bench))\n"
    )
    path = f"{ROOT}:{Path(__file__).parent}"
    environment = {"PATH": "", "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert len(lines) == 15
    assert all("'samples': {'a step': {'ms': " in line and train.ESTIMATE in line for line in lines), run.stdout
