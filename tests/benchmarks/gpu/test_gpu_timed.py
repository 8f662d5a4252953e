"""The parts that the GPU suite times: products in every way, layers at few tokens, work once per step, whole steps."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the GPU suite measures Triton kernels")

from gpu_records import CEILINGS, documents_of, on_host

from benchmarks.gpu import cases, many, once_a_step, products, report, timing, train, ways
from benchmarks.gpu.cases import DENSE, DRY_SHAPE, EAGER, FUSED, HELD, LAYER, Case
from benchmarks.gpu.results import FAILED, NOT_MEASURED

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


def test_a_layer_that_computes_something_else_is_not_timed(bench, monkeypatch):
    monkeypatch.setitem(products._LAYERS, products.OP, lambda: ways.Layer(ways.dense_layer))  # it is unmasked
    fields = at_host(bench)
    assert fields["failures"].keys() == {products.OP, products.OP + products.IN_GRAPH}
    assert "from the eager form" in fields["failures"][products.OP]
    assert not [name for name in fields["samples"] if name.startswith("masked_linear")]


@pytest.mark.parametrize("what", ["forward", "d_x", "d_scores", "accumulate", "accumulate_product", "step"])
def test_products_are_checked_and_timed_by_every_way(what, bench):
    names = [DENSE, FUSED] if what == "accumulate_product" else [DENSE, EAGER, FUSED, "fused, packed", "auto, packed"]
    names += [LAYER, HELD] if what == "step" else []
    fields = timed(what, bench, *names)
    assert fields["failures"] == {}
    assert list(fields["samples"]) == names
    assert fields["samples"][FUSED]["floor_ms"] > 0
    assert "percent_of_cublas" in fields["samples"][FUSED]


def test_rows_with_a_mask_each_are_timed(bench):
    fields = many.time_many(Case("many", *DRY_SHAPE, 3), bench)
    assert (list(fields["samples"]), fields["failures"], fields["left_out"]) == ([DENSE, FUSED], {}, {})
    assert fields["samples"][FUSED]["floor_ms"] > fields["samples"][DENSE]["floor_ms"]  # three masks


def test_a_way_that_is_wrong_is_not_timed(bench, monkeypatch):
    def twice(self, o, weight, signs):
        return o.sums.add_(o.grad.T.float() @ o.x.float(), alpha=2)

    monkeypatch.setattr(ways.Ours, "_add", twice)
    assert "wrong: 1 from the eager form" in timed("accumulate_product", bench, DENSE, FUSED)["failures"][FUSED]
    monkeypatch.setattr(ways, "held_layer", ways.dense_layer)
    failures = timed("step", bench, DENSE, HELD, LAYER)["failures"]
    assert failures.keys() == {HELD}
    assert "from the eager form" in failures[HELD]


def test_steps_of_both_schemes_are_timed_beside_adam(bench):
    fields = steps(bench)
    assert set(fields["samples"]) == {"int16, 8-bit, Triton", "fp32, exact, Triton", once_a_step.TORCH_ADAMW}
    assert (fields["failures"], fields["left_out"]) == ({}, {})


def test_a_step_that_leaves_its_moments_is_not_timed(bench, monkeypatch):
    right = once_a_step.score_step
    calls = iter(range(10**6))

    def lazy(scores, grad, weight, exp_avg, exp_avg_sq, *rest, **options):
        if next(calls) % 2:  # the reference runs first, then ours
            return right(scores, grad, weight, exp_avg, exp_avg_sq, *rest, **options)
        return right(scores, grad, weight, exp_avg.clone(), exp_avg_sq.clone(), *rest, **options)

    monkeypatch.setattr(once_a_step, "score_step", lazy)
    failures = steps(bench)["failures"]
    assert failures.keys() == {"int16, 8-bit, Triton", "fp32, exact, Triton"}
    assert failures["fp32, exact, Triton"].startswith("wrong: ")


def test_selections_that_disagree_are_not_timed(bench, monkeypatch):
    monkeypatch.setattr(once_a_step, "_op", lambda name, backend, arguments, scores: [scores.abs().max()])
    fields = once_a_step.time_threshold(Case("threshold", *DRY_SHAPE, detail="float32"), bench)
    assert fields["failures"].keys() == {"kept_threshold"}
    assert {"sort", "kthvalue", "topk", "boolean mask, eager"} <= fields["samples"].keys()


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
    assert len(lines) == 12
    assert all("'samples': {'a step': {'ms': " in line and train.ESTIMATE in line for line in lines), run.stdout


def test_a_model_that_learns_something_else_is_not_timed(monkeypatch, bench):
    case = Case("train", m=8, detail="a SmolLM2 layer, plain")
    train._losses_by_the_reference.cache_clear()
    monkeypatch.setattr(train, "_losses_by_the_reference", lambda *_: [4.0, 4.0])
    calls = iter([4.0, 4.2])
    monkeypatch.setattr(train.Steps, "__init__", lambda self, *_: None)
    monkeypatch.setattr(train.Steps, "__call__", lambda self: next(calls, 4.0))
    monkeypatch.setattr(train.Steps, "close", lambda self: None)
    fields = train.time_train(case, bench)
    assert fields["status"] == FAILED
    assert fields["reason"].startswith("wrong: losses [4.0, 4.2]")
    calls = iter([4.0, 4.04])
    assert "status" not in train.time_train(case, bench)


def test_without_transformers_whole_steps_say_so(monkeypatch, bench):
    monkeypatch.setitem(sys.modules, "transformers", None)
    train._losses_by_the_reference.cache_clear()
    fields = train.time_train(Case("train", m=8, detail="SmolLM2-135M, layerwise"), bench)
    assert fields["status"] == NOT_MEASURED
    assert fields["reason"].startswith("without transformers")


def test_the_sizes_are_the_real_models():
    layer, whole = train.config_of("a SmolLM2 layer"), train.config_of("SmolLM2-135M")
    assert (layer["hidden_size"], layer["num_hidden_layers"], whole["num_hidden_layers"]) == (576, 1, 30)
    assert {case.detail.rsplit(", ", 1)[1] for case in cases.plan(["train"], [], [2048])} == set(train.WAYS)
