"""Benchmarks: what is counted, recorded and printed; nothing is timed."""

import json

import pytest
import torch
from ratio_records import record

from benchmarks import harness
from benchmarks.__main__ import QUESTIONS
from benchmarks.harness import Finding, Spread, report
from benchmarks.pooled import pooled
from benchmarks.roofline import count_work

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
    def of(median, rounds, **changes):
        made = record(median, 0.5, date=str(median), **changes) | {"title": "t", "cases": [{"m": 8, "rounds": rounds}]}
        made["findings"][0] |= {"rule": "at most", "bound": 2, "met": median < 2}
        return made

    found = pooled([of(3.0, 2), of(1.0, 3), of(1.5, 2)])
    assert found["findings"][0]["measured"] == {"median": 1.5, "low": 0.5, "high": 3.5}
    assert found["cases"] == [{"m": 8, "rounds": 7}]
    assert found["environment"]["date"] == "3.0"
    with pytest.raises(ValueError, match="every process must give the same quantity, got ours.*, theirs"):
        pooled([of(1.0, 2), of(1.0, 2, quantity="theirs")])
    with pytest.raises(ValueError, match="every process must give the same cases"):
        pooled([of(1.0, 2), of(1.0, 2) | {"cases": []}])


def test_each_question_names_functions_that_exist():
    for question in QUESTIONS.values():
        for name in filter(None, (question.main, question.joins)):
            assert callable(question.function(name))


def test_a_case_is_chosen_by_its_name_or_a_pattern(monkeypatch):
    monkeypatch.setattr(harness, "_pattern", "*")
    cases = ["step, bf16, M = 1", "step, bf16, M = 16", "step, fp32, M = 1"]
    assert harness.select_cases(cases) == cases
    harness.choose_cases("step, bf16, M = 1")
    assert harness.select_cases(cases) == cases[:1]
    harness.choose_cases("*M = 1")
    assert harness.select_cases(cases) == cases[::2]
    harness.choose_cases("forward")
    with pytest.raises(SystemExit, match=r"--case must name one of these, .* got forward:\n    step, bf16, M = 1\n"):
        harness.select_cases(cases)


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
