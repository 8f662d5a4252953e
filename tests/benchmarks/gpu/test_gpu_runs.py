"""The GPU suite keeps to its time, and survives kernels that hang or kill the process."""

import faulthandler
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the GPU suite measures Triton kernels")

from gpu_records import results_of

from benchmarks.gpu import __main__ as command
from benchmarks.gpu.cases import CUDA, SQUARE, Case, plan
from benchmarks.gpu.results import FAILED, MEASURED, NOT_MEASURED, SLOW, WAITING, Results, read
from benchmarks.gpu.worker import run_cases

ROOT = Path(__file__).resolve().parents[3]
D_X = [Case("d_x", 1024, 4096, m) for m in (1, 16, 64)]


class Clock:
    """A clock that stands still unless it is changed."""

    now = 1000.0

    def __call__(self):
        return self.now


def run(cases, out, cost, deadline):
    """Run the cases with a fake measurement, which records the seconds that it may take."""
    clock, results = Clock(), results_of(out, cases)

    def measure(case, seconds):
        assert seconds > 0
        clock.now += cost(case)
        return {"samples": {}, "failures": {}, "allowed": seconds}

    run_cases(cases, measure, results, deadline, clock=clock, say=lambda line: None)
    return [results.of(case) for case in cases]


# ---------------------------------------------------------------------------------------------- one process


def test_no_case_is_begun_after_the_deadline(tmp_path):
    records = run(plan(["forward", "d_x"], [(1024, 4096)], [1, 16, 64]), tmp_path, lambda case: 10.0, 1035.0)
    assert [r["status"] for r in records] == [MEASURED] * 4 + [NOT_MEASURED] * 2
    assert all("samples" not in r and r["reason"] == WAITING for r in records[4:])


def test_programs_leave_time_for_what_comes_behind_them(tmp_path):
    whole = plan(["correctness"], [SQUARE], [512])
    for cases, seconds in (([*whole, Case("accumulate", *SQUARE, 512)], 60), (whole, 500)):
        out = tmp_path / str(len(cases))
        out.mkdir()
        allowed = {r["detail"]: r["allowed"] for r in run(cases, out, lambda case: 0.0, 1500.0)}
        assert allowed["tests"] == seconds
        assert (allowed["cuda memcheck"], allowed["exact"]) == (100, 500)


def test_a_case_is_on_disk_as_failed_while_it_runs(tmp_path):
    results, seen = results_of(tmp_path, D_X), []

    def measure(case, seconds):
        seen.append([r["status"] for document in read(tmp_path) for r in document["cases"]])
        return {}

    run_cases(D_X, measure, results, 2000.0, clock=Clock(), say=lambda line: None)
    assert seen == [
        [FAILED, NOT_MEASURED, NOT_MEASURED],
        [MEASURED, FAILED, NOT_MEASURED],
        [MEASURED, MEASURED, FAILED],
    ]


def test_a_lost_device_ends_the_process_and_is_told(tmp_path):
    results = results_of(tmp_path, D_X)

    def measure(case, seconds):
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nand more")

    with pytest.raises(RuntimeError, match="illegal memory access"):
        run_cases(D_X, measure, results, 2000.0, clock=Clock())
    again = Results(tmp_path, "a run")
    assert again.running() == D_X[0]
    assert again.of(D_X[0])["running"]["lost"] == "CUDA error: an illegal memory access was encountered"


def test_each_case_has_its_patience_and_the_watch_ends_with_it(tmp_path, monkeypatch):
    watched = []
    monkeypatch.setattr(faulthandler, "dump_traceback_later", lambda seconds, *, exit: watched.append(seconds))
    monkeypatch.setattr(faulthandler, "cancel_dump_traceback_later", lambda: watched.append("off"))
    cases = [Case("correctness", detail="exact"), Case("correctness", detail="cuda memcheck"), Case("host", 8, 8, 1)]
    run(cases, tmp_path, lambda case: 1.0, 2000.0)
    assert watched == [225.0, "off", 130.0, "off", 90.0, "off"]


# ---------------------------------------------------------------------------------------------- several processes

_WORKER = """
import faulthandler, json, os, signal, sys, time
from pathlib import Path
from benchmarks.gpu.cases import Case
from benchmarks.gpu.results import Results
from benchmarks.gpu.worker import run_cases

own = json.loads(sys.argv[-1])
cases, results = {cases}, Results(Path(sys.argv[1]), own["run"])
results.begin(cases, {{"device": "a card"}}, {{}})

Case.patience = 0.5

def measure(case, seconds):
    without_cuda = own["without_cuda"].get("", own["without_cuda"].get(case.what))
    if case.m == 16 or case.detail == "cuda exact":
        {ending}
    return {{"samples": {{}}, "left_out": {{"cuda": without_cuda}} if without_cuda else {{}}}}

run_cases(cases, measure, results, own["deadline"])
"""


def measured(tmp_path, ending, cases=tuple(D_X), seconds=60.0, grace=0.0):
    """Return (records, whether the last process ended by itself)."""
    script = tmp_path / "a_worker.py"
    script.write_text(_WORKER.format(ending=ending, cases=list(cases)))
    line = ["env", f"PYTHONPATH={ROOT}", sys.executable, str(script), str(tmp_path)]
    well = command.measure(line, tmp_path, time.time() + seconds, grace=grace)
    return {(r["m"], r["detail"]): r for document in read(tmp_path) for r in document["cases"]}, well


def statuses(records):
    return [records[m, ""]["status"] for m in (1, 16, 64)]


_UNLESS_WITHOUT_CUDA = "if not without_cuda: "
_CRASH, _HANG = "os.kill(os.getpid(), signal.SIGSEGV)", "time.sleep(60)"


@pytest.mark.parametrize(
    ("ending", "reason", "verdict", "kind"),
    [
        (_CRASH, "the process died, exit code -11", FAILED, "failures"),
        ("raise RuntimeError('illegal address')", "illegal address", FAILED, "failures"),
        (_HANG, "no end after ", SLOW, "slow"),  # which says nothing about its results
    ],
)
def test_a_process_that_dies_or_hangs_loses_one_case(tmp_path, ending, reason, verdict, kind):
    records, well = measured(tmp_path, ending)
    assert statuses(records) == [MEASURED, verdict, MEASURED]
    assert records[16, ""]["reason"].startswith(reason)
    assert records[16, ""][kind][CUDA].startswith(reason)  # without CUDA the case ended the same way
    assert {"failures", "slow"} & records[16, ""].keys() == {kind}
    assert well


def test_what_is_slow_is_said_and_costs_an_exit_code_of_its_own(tmp_path, capsys):
    measured(tmp_path, _UNLESS_WITHOUT_CUDA + _HANG)
    assert command.main(["--report", str(tmp_path)]) == 3
    said = capsys.readouterr().out
    assert "## What failed\n\nNothing." in said
    assert "- SLOW: d_x 1024 x 4096, M = 16: cuda: no end after 0 s: it hangs, or is slow" in said


def test_a_case_that_fails_with_cuda_is_measured_once_more_without(tmp_path):
    records, _ = measured(tmp_path, _UNLESS_WITHOUT_CUDA + _CRASH)
    assert statuses(records) == [MEASURED, FAILED, MEASURED]
    culprit, later = records[16, ""], records[64, ""]
    assert "samples" in culprit  # of the other competitors
    assert culprit["failures"] == {CUDA: "the process died, exit code -11"}
    assert culprit["left_out"] == {}
    why = "not tried again after d_x 1024 x 4096, M = 16: the process died, exit code -11"
    assert later["left_out"] == {CUDA: why}


@pytest.mark.parametrize(("ending", "is_tried"), [(_CRASH, True), (_HANG, False)])
def test_cuda_is_left_out_of_its_kind_of_case_and_after_a_hang_of_every_kind(tmp_path, ending, is_tried):
    cases = [Case("d_x", *SQUARE, 16), Case("d_x", *SQUARE, 64), Case("forward", *SQUARE, 1)]
    records, _ = measured(tmp_path, _UNLESS_WITHOUT_CUDA + ending, cases)
    assert CUDA in records[64, ""]["left_out"]
    assert (CUDA not in records[1, ""]["left_out"]) == is_tried


def test_a_cuda_check_that_hangs_is_not_followed_by_others(tmp_path):
    cases = [Case("correctness", detail="cuda exact"), Case("correctness", detail="cuda layouts")]
    records, _ = measured(tmp_path, _UNLESS_WITHOUT_CUDA + _HANG, cases)
    assert records[0, "cuda exact"]["status"] == SLOW
    assert "it hangs, or is slow" in records[0, "cuda layouts"]["left_out"][CUDA]


@pytest.mark.slow
def test_what_overruns_the_time_is_ended_and_nothing_else_begun(tmp_path):
    records, well = measured(tmp_path, "faulthandler.cancel_dump_traceback_later(); time.sleep(60)", seconds=5.0)
    assert records[16, ""]["status"] == NOT_MEASURED
    assert records[16, ""]["reason"] == "the time was up while it ran"
    assert well


def test_a_process_that_cannot_begin_is_not_begun_again(tmp_path, capsys):
    assert not command.measure([sys.executable, "-c", "raise SystemExit(7)"], tmp_path, time.time() + 60)
    assert "died between two cases, exit code 7" in capsys.readouterr().err
    assert read(tmp_path) == []


def test_what_was_measured_when_the_machine_went_away_is_reported_from_its_files(tmp_path, capsys):
    script = tmp_path / "a_worker.py"
    ending = f"Path({str(tmp_path)!r}, 'pid').write_text(str(os.getpid())); time.sleep(60)"
    script.write_text(_WORKER.format(ending=ending, cases=D_X).replace("patience = 0.5", "patience = 600.0"))
    own = json.dumps({"run": "a run", "deadline": time.time() + 60, "without_cuda": {}})
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, str(script), str(tmp_path), own], env=environment)
    pid, patience = tmp_path / "pid", time.monotonic() + 60
    while not (pid.exists() and pid.read_text()):
        assert process.poll() is None
        assert time.monotonic() < patience
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert command.main(["--report", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert "- d_x 1024 x 4096, M = 16: the process ended while it ran" in said
    assert "1 of 3 cases were measured, 1 failed." in said
    assert "a card" in (tmp_path / "gpu.md").read_text()
    assert command.main(["--report", str(tmp_path / "none")]) == 2


def test_a_run_leaves_the_results_of_other_kinds_and_replaces_its_own(tmp_path):
    results_of(tmp_path, plan(["d_x", "forward"], [SQUARE], [64]))
    later = Results(tmp_path, "another run")
    later.begin(plan(["d_x"], [SQUARE], [512]), {"device": "another"}, {})
    assert {d["what"]: (d["environment"]["device"], len(d["cases"])) for d in read(tmp_path)} == {
        "forward": ("a card", 1),
        "d_x": ("another", 1),
    }
    assert not Results(tmp_path, "a third").running()
