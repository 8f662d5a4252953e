"""A backend requested by MFT_KERNELS is measured with ours in one run, each under its own name."""

import json
import os
import sys

import pytest

from benchmarks import bench_cpu, bench_ops, harness, layer_competitors, matrix_competitors, rivals, roofline
from benchmarks.__main__ import main
from benchmarks.layer_competitors import DENSE, FROM_SCORES, HELD, IN_PLACE, MODULE, LayerCompetitors, inputs_of
from benchmarks.side_by_side import OURS, SideBySide
from benchmarks.tables import cpu_table, ops_table
from mft_kernels.backends import table as backends
from mft_kernels.timing import time_interleaved, time_within

COMPILED = (
    (layer_competitors, "compiled_eager", rivals.eager_fast),
    (matrix_competitors, "compiled_pack", matrix_competitors.eager_pack),
    (matrix_competitors, "compiled_step", matrix_competitors.eager_step),
)


@pytest.fixture
def called(own_table, monkeypatch):
    """Request a backend "mine" that uses every op of the reference; return the list of ops called on it."""
    seen = []

    def noted(name, run):
        return lambda *arguments, **named: seen.append(name) or run(*arguments, **named)

    functions = {name: noted(name, run) for name, run in backends.registered("reference").functions.items()}
    about = {"takes": backends.OPERANDS, "detail": "blocks of 256 rows"}
    backends.register(backends.Backend("mine", frozenset({"cpu"}), frozenset(), functions, **about))
    monkeypatch.setenv("MFT_KERNELS", "mine")
    return seen


def test_without_a_request_ours_stands_alone(own_table):
    found = SideBySide.here()
    assert found.asked == {OURS: "auto"}
    assert found.competitors([DENSE, MODULE]) == [DENSE, MODULE]


def test_what_is_asked_for_stands_after_ours_by_its_name(called):
    found = SideBySide.here()
    assert found.asked == {OURS: "auto", "mine": "mine"}
    assert found.competitors([DENSE, MODULE, OURS]) == [DENSE, MODULE, "mine, module", OURS, "mine"]
    assert [found.our_name(name) for name in ("mine, module", "mine", MODULE, DENSE)] == [MODULE, OURS, MODULE, DENSE]
    assert found.record() == {
        OURS: f"{(own := backends.backend_report()['auto']['cpu'])}: {backends.registered(own).detail}",
        "mine": "mine: blocks of 256 rows",
    }


def test_a_competitor_runs_on_the_backend_of_its_name(called):
    made, found = LayerCompetitors(24, 40), SideBySide.here()
    assert called == []  # our own backend made the shared inputs
    for name in found.competitors([DENSE, FROM_SCORES, MODULE, HELD]):
        for op in ("forward", "d_x", "d_scores", "step"):
            call = made.call(name, op, inputs_of(3, 24, 40))
            called.clear()
            with found.around(name):
                call()
            assert bool(called) == name.startswith("mine"), (name, op)
            assert os.environ["MFT_KERNELS"] == "mine"


@pytest.mark.parametrize(
    "taken", [lambda **how: time_interleaved(rounds=2, **how), lambda **how: time_within(seconds=0, **how)]
)
def test_every_sample_is_taken_inside_what_holds_for_its_competitor(taken, called):
    found, seen = SideBySide.here(), {OURS: set(), "mine": set(), DENSE: set()}
    calls = {name: lambda name=name: seen[name].add(os.environ["MFT_KERNELS"]) for name in seen}
    taken(competitors=calls, around=found.around)
    assert seen == {OURS: {"auto"}, "mine": {"mine"}, DENSE: {"mine"}}


def test_ops_measures_both_and_names_them_in_record_and_table(called, tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "_folder", tmp_path)
    monkeypatch.setattr(roofline, "GEMM_SIZE", 64)
    monkeypatch.setattr(roofline, "COPY_BYTES", 2**20)
    for module, name, eager in COMPILED:
        monkeypatch.setattr(module, name, eager)  # compiling them takes 20 s, and another test does it
    monkeypatch.setattr(bench_ops, "QUICK", bench_ops.Budget(((24, 64),), (1,), 0.0, 1))
    bench_ops.main(quick=True)
    (path,) = tmp_path.glob("*.json")
    assert path.name == "ops-cpu-mine.json"  # ours has a different name
    record = json.loads(path.read_text())
    names = {case["competitor"] for case in record["cases"]}
    assert {FROM_SCORES, "mine, from scores", HELD, "mine, held mask", OURS, "mine", "mine, fp32"} <= names
    assert record["environment"]["backends"]["mine"] == "mine: blocks of 256 rows"
    assert record["environment"]["backends"][OURS] != record["environment"]["backends"]["mine"]
    ratios = {finding["quantity"] for finding in record["findings"]}
    assert {
        f"{one}: forward, 24 x 64, M = 1" for one in (f"{FROM_SCORES} / {DENSE}", "mine, module / ours, module")
    } <= ratios
    assert "| 24 x 64 | mine, held mask |" in ops_table({"mine": record})


def test_cpu_measures_both_and_asks_nothing_of_another_backend(called, tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "_folder", tmp_path)
    small = bench_cpu.Budget(many=(((24, 64), (("forward", 1),)),), one=(), seconds=0.0, ceilings=16)
    bench_cpu.main(quick=True, budget=small)
    record = json.loads((tmp_path / "cpu-mine.json").read_text())
    names = [case["competitor"] for case in record["cases"] if case["dtype"] == "fp32"]
    assert names == [DENSE, IN_PLACE, FROM_SCORES, "mine, from scores", HELD, "mine, held mask", "eager"]
    asked = {finding["quantity"]: finding["rule"] for finding in record["findings"]}
    assert asked["ours, held mask / eager: forward, fp32, 24 x 64, M = 1, 1 thread"] == "at most"
    assert asked["mine, held mask / eager: forward, fp32, 24 x 64, M = 1, 1 thread"] is None
    assert "mine, held mask / ours, held mask: forward, fp32, 24 x 64, M = 1, 1 thread" in asked
    assert ": mine, held mask |" in cpu_table({"mine": record})


def test_questions_that_measure_ours_alone_refuse_a_request(called, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmarks", "ops", "launch"])
    with pytest.raises(SystemExit):
        main()
    told = capsys.readouterr().err
    assert "questions must be among ops, cpu to measure mine beside ours, got launch" in told
    assert "unset MFT_KERNELS" in told
