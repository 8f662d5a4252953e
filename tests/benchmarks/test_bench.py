"""Benchmarks: what is counted, recorded and printed; nothing is timed."""

import json
import subprocess
import sys
import time

import pytest
import torch
from ratio_records import spread

from benchmarks import bench_ops, bench_paths, harness
from benchmarks.__main__ import QUESTIONS
from benchmarks.bench_paths import joined
from benchmarks.harness import Finding, Spread, report
from benchmarks.layer_competitors import DENSE, EAGER, FROM_SCORES, LORA, PAPER
from benchmarks.pooled import pooled
from benchmarks.roofline import Ceilings, count_work
from benchmarks.tables import markdown, ops_tables
from mft_kernels.backends import cpu

# ---------------------------------------------------------------------------------------------- records and tables


def test_a_record_reads_back_and_gives_each_finding_a_line(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "_folder", tmp_path)
    findings = [Finding("a", Spread(1.23456789, 1.0, 2.0)), Finding("b", Spread(1.0, 1.0, 1.0), "ms", "at most", 2)]
    path = report("ops", "Title", findings, printed=False, cases=[{"m": 1}])
    stored = json.loads(path.read_text())
    assert stored["findings"][0]["measured"]["median"] == 1.23457
    assert stored["findings"][1]["met"] is True
    assert stored["cases"] == [{"m": 1}]
    assert {"device", "threads", "torch", "commit", "backend"} <= stored["environment"].keys()
    assert sum('"quantity"' in line for line in path.read_text().splitlines()) == 2


def test_pooled_records_span_every_process():
    def record(median, met, rounds):
        spread = {"median": median, "low": median - 1, "high": median + 1}
        finding = {
            "quantity": "ours / dense",
            "measured": spread,
            "unit": "x",
            "rule": "at most",
            "bound": 2,
            "met": met,
        }
        return {
            "title": "t",
            "environment": {"date": str(median)},
            "cases": [{"m": 8, "rounds": rounds}],
            "findings": [finding],
        }

    found = pooled([record(3.0, False, 2), record(1.0, True, 3), record(1.5, True, 2)])
    assert found["findings"][0]["measured"] == {"median": 1.5, "low": 0.0, "high": 4.0}
    assert found["cases"] == [{"m": 8, "rounds": 7}]
    assert found["environment"] == {"date": "3.0"}
    other = record(1.0, True, 2)
    other["findings"][0]["quantity"] = "theirs"
    with pytest.raises(ValueError, match="every process must give the same quantity, got ours / dense, theirs"):
        pooled([record(1.0, True, 2), other])
    with pytest.raises(ValueError, match="every process must give the same cases"):
        pooled([record(1.0, True, 2), record(1.0, True, 2) | {"cases": []}])


@pytest.mark.skipif(cpu.unavailable is not None, reason=f"cpu backend: {cpu.unavailable}")
def test_paths_of_several_processes_stand_side_by_side_and_the_worst_counts():
    def record(ms, held_back=None):
        """Return a record with one case: the milliseconds of each path; the path for few tokens is chosen."""
        spreads = {path: {"median": took, "low": took, "high": took} for path, took in ms.items()}
        best = min(ms.values())
        behind = {path: {"median": took / best, "low": 1.0, "high": 3.0} for path, took in ms.items()}
        case = {"product": "forward", "dtype": "fp32", "source": "words", "n": 4096, "k": 4096, "m": 1}
        row = case | {"weight_bytes": 4.125, "mask_bytes": 0.125, "ms": spreads, "times_best": behind, "rounds": 9}
        return {"title": "t", "held_back": held_back or {}, "cases": [row], "findings": []}

    first, second = record({"few": 1.0, "slabs": 2.0, "fused": 3.0}), record({"few": 2.6, "slabs": 2.0})
    found = joined([first, second])
    assert found["cases"] == first["cases"] + second["cases"]
    assert [finding["measured"]["median"] for finding in found["findings"]] == [1.3]  # "few" is chosen for one token
    with pytest.raises(ValueError, match="every process must be held back alike"):
        joined([first, record({"few": 1.0}, {"ONEDNN_MAX_CPU_ISA": "AVX2"})])


def test_a_path_that_takes_long_is_known_by_one_call(monkeypatch):
    monkeypatch.setattr(bench_paths, "LONG", 0.02)
    seconds = {"few": 0.001, "fused": 0.01, "slabs": 0.05}
    calls = {path: lambda spent=spent: time.sleep(spent) for path, spent in seconds.items()}
    found = bench_paths._long(calls)
    assert list(found) == ["slabs"]
    assert found["slabs"] >= 50  # milliseconds
    assert bench_paths._long({"fused": calls["slabs"]}) == {}  # no other path to choose


def test_a_case_of_ops_is_printed_once_with_every_competitor(capsys):
    measured = bench_ops.Measured()
    case = bench_ops.Case("forward", 4, 8, 512)
    times = {DENSE: [1.0, 2.0], FROM_SCORES: [2.0, 4.0], EAGER: [3.0, 6.0], LORA: [1.5, 3.0]}
    measured.add(case, DENSE, {}, times)
    measured.add(case, DENSE, {}, {DENSE: [1.1, 2.1], PAPER: [11.0, 21.0]})
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("forward, 4 x 8, M = 512: 1.500 ")
    assert [line.split()[0] for line in lines[1:]] == ["2.000", "3.000", "1.500", "10.0"]
    assert [line.split("x  ")[1] for line in lines[1:]] == [FROM_SCORES, EAGER, LORA, PAPER]
    assert [finding.quantity for finding in measured.findings] == [f"{FROM_SCORES} / {DENSE}: {case}"]


def test_help_has_a_line_for_each_question_and_needs_no_torch():
    ask = "import sys, benchmarks.__main__ as b; b._parser().print_help(); assert 'torch' not in sys.modules"
    printed = subprocess.run([sys.executable, "-c", ask], cwd=harness.ROOT, capture_output=True, text=True, check=True)
    lines = printed.stdout.splitlines()
    assert all(f"  {name:16} {question.asks}" in lines for name, question in QUESTIONS.items())
    assert printed.stderr == ""


def test_each_question_names_functions_that_exist():
    for question in QUESTIONS.values():
        for name in filter(None, (question.main, question.shows, question.joins)):
            assert callable(question.function(name))


def test_a_case_is_chosen_by_its_name_or_a_pattern(monkeypatch):
    monkeypatch.setattr(harness, "_pattern", "*")
    cases = ["step, bf16, M = 1", "step, bf16, M = 16", "step, fp32, M = 1"]
    assert harness.chosen(cases) == cases
    harness.choose_cases("step, bf16, M = 1")
    assert harness.chosen(cases) == cases[:1]
    harness.choose_cases("*M = 1")
    assert harness.chosen(cases) == cases[::2]
    harness.choose_cases("forward")
    with pytest.raises(SystemExit, match=r"--case must name one of these, .* got forward:\n    step, bf16, M = 1\n"):
        harness.chosen(cases)


def test_the_table_of_ops_has_a_row_a_shape_and_competitor():
    def case(name, m, ratio):
        own = {"op": "forward", "n": 4, "k": 8, "m": m, "competitor": name, "ms": spread(1.0), "ratio": spread(ratio)}
        return own | {"share": 0.5}

    once = case("ours", 0, 2.0) | {"op": "threshold"}
    cases = [case("dense", 1, 1.0), case("ours", 1, 1.25), case("ours", 8, 1.5), once]
    forward, at_once, _ = ops_tables({"cases": cases, "ceilings": {}})
    assert "| 4 x 8 | ours | 1.25 (50) | 1.5 (50) |" in forward
    assert "dense |" not in forward
    assert "| threshold | 4 x 8 | ours | 1 | 2 (50) |" in at_once


def test_markdown_aligns_numbers_to_the_right():
    assert markdown(["a", "b"], [["x", "1"]]) == "| a | b |\n|---|---:|\n| x | 1 |"


# ---------------------------------------------------------------------------------------------- roofline


def test_work_counts_each_operand_once():
    forward = count_work("forward", "scores", 2, 4, 8)
    assert forward.flops == 2 * 2 * 4 * 8
    assert forward.bytes == 4 * 8 * (2 + 2) + 2 * 2 * (4 + 8)
    assert count_work("threshold", "scores", 0, 4, 8).bytes == 4 * 8 * 2
    step = count_work("step", "dense", 2, 4, 8)
    assert step.flops == 3 * forward.flops
    assert count_work("step", "dense", 2, 4, 8, torch.float32).bytes == 2 * step.bytes
    held = count_work("forward", "held", 2, 4, 8, torch.float32)
    assert held.bytes == 4 * 8 * (4 + 1 / 8) + 4 * 2 * (4 + 8)


def test_the_share_is_of_the_ceiling_that_binds():
    ceilings = Ceilings()
    ceilings.gemm, ceilings.copy = [1e9], [1e9]
    assert ceilings.share(count_work("forward", "dense", 1, 1000, 1000), 4.0) == pytest.approx(2.004e6 / 4e6)
    assert ceilings.share(count_work("forward", "dense", 1000, 1000, 1000), 4e3) == pytest.approx(0.5)
