"""How the GPU suite keeps to its budget, and outlives kernels that hang or take the worker with them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the GPU suite measures Triton kernels")

from gpu_records import Clock

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import worker
from benchmarks.gpu.cases import CUDA, SHAPES, SQUARE, TOKENS, Case, plan
from benchmarks.gpu.journal import FAILED, MEASURED, NOT_MEASURED, Journal

ROOT = Path(__file__).resolve().parents[3]
EVERY_SHAPE = [shape for shapes in SHAPES.values() for shape in shapes]


@pytest.fixture
def journal(tmp_path):
    return Journal(tmp_path / "journal")


def run(planned, journal, clock, cost, budget=100.0, lines=None):
    def measure(case, seconds):
        assert seconds > 0
        clock.now += cost(case)
        return MEASURED, {"samples": {}, "failures": {}}

    worker.run_cases(planned, measure, journal, budget=budget, deadline=1000.0 + budget, clock=clock,
                     say=(lines if lines is not None else []).append)  # fmt: skip


def test_no_case_is_begun_that_would_not_end_in_time(journal):
    planned, clock = plan(["forward", "d_x"], [(1024, 4096)], TOKENS), Clock()
    run(planned, journal, clock, lambda case: 10.0, budget=60.0)
    assert clock.now <= 1060.0
    records = list(journal.records().values())
    assert [r["status"] for r in records].count(MEASURED) == 5  # a sixth, of 10 s, is expected to take 15
    late = [r for r in records if r["status"] == NOT_MEASURED]
    assert len(late) == 13
    assert all("samples" not in r and "were left" in r["reason"] for r in late)


def test_a_dear_case_that_does_not_fit_makes_room_for_cheap_ones(journal):
    planned, clock = [Case("step", *SQUARE, 16), Case("memory", 1024, 4096, 16)], Clock()
    run(planned, journal, clock, lambda case: 1.0, budget=10.0)
    assert [r["status"] for r in journal.records().values()] == [NOT_MEASURED, MEASURED]


def test_the_tests_leave_time_for_what_comes_behind_them(journal):
    allowed, clock = {}, Clock()

    def measure(case, seconds):
        allowed[case.detail] = seconds
        clock.now += 5.0 if case.what == "forward" else 0.0
        return MEASURED, {"passed": 1, "failed": 0, "skipped": 0}

    planned = plan(["correctness", "forward"], EVERY_SHAPE, TOKENS)
    upto_tests = planned[: [case.detail for case in planned].index("tests") + 1]
    ahead = 5 * sum(case.what == "forward" for case in upto_tests)
    for some, seconds in ((planned, 500 - ahead - 1.5 * (5 * 54 - ahead)), (upto_tests, 500 - ahead)):
        clock.now = 1000.0
        fresh = Journal(journal.path.with_name(str(len(some))))
        worker.run_cases(some, measure, fresh, budget=500.0, deadline=1500.0, clock=clock, say=lambda line: None)
        assert allowed["tests"] == pytest.approx(seconds)


def test_progress_is_a_line_a_case_with_elapsed_and_expected_time(journal):
    lines: list[str] = []
    run(plan(["d_x"], [(1024, 4096)], [1, 16]), journal, Clock(), lambda case: 2.0, lines=lines)
    assert lines[0].startswith("[1/2] d_x 1024 x 4096 M = 1: ")
    assert lines[0].endswith("2.0 s, at 2 of 5 s")


def test_a_second_worker_goes_on_where_the_first_ended(journal):
    planned, measured = plan(["d_x"], [(1024, 4096)], [1, 16, 64]), []
    journal.record(planned[0], FAILED, reason="died")

    def measure(case, seconds):
        measured.append(case)
        return MEASURED, {}

    worker.run_cases(planned, measure, journal, budget=90, deadline=1090, clock=Clock(), say=lambda line: None)
    assert measured == [planned[2], planned[1]] or measured == planned[1:]
    assert journal.records()[planned[0].key]["reason"] == "died"


def test_a_line_that_was_cut_off_is_no_event(journal):
    journal.started(Case("d_x", 1, 2, 3), 60)
    journal.path.write_text(journal.path.read_text() + '{"event": "rec')
    assert journal.unfinished()["key"] == Case("d_x", 1, 2, 3).key


_WORKER = """
import os, signal, sys, time
from pathlib import Path
from benchmarks.gpu.cases import Case
from benchmarks.gpu.journal import MEASURED, Journal
journal = Journal(Path(sys.argv[1]))
for m in (1, 16, 64):
    case = Case("d_x", 1024, 4096, m)
    if case.key in journal.records():
        continue
    journal.started(case, 0.5)
    if m == 16:
        {ending}
    journal.record(case, MEASURED)
"""


def watch(tmp_path, journal, ending, seconds=60.0, what="d_x"):
    script = tmp_path / "a_worker.py"
    script.write_text(_WORKER.format(ending=ending))
    planned = plan([what], [(1024, 4096)], [1, 16, 64])
    environment = {"PYTHONPATH": str(ROOT)}
    command_line = [sys.executable, str(script), str(journal.path)]

    command.watch(command_line, environment, journal, planned, time.time() + seconds, poll=0.02)
    return {r["m"]: r for r in journal.records().values()}


def test_a_worker_that_dies_loses_one_case(tmp_path, journal):
    records = watch(tmp_path, journal, "os.kill(os.getpid(), signal.SIGSEGV)")
    assert [records[m]["status"] for m in (1, 16, 64)] == [MEASURED, FAILED, MEASURED]
    assert records[16]["reason"] == "the worker died, exit code -11"


def test_a_lost_device_is_named(tmp_path, journal):
    records = watch(tmp_path, journal, "journal.add('lost', key=case.key, message='illegal address'); sys.exit(1)")
    assert records[16]["reason"] == "illegal address"
    assert records[64]["status"] == MEASURED


def test_a_kernel_that_hangs_loses_one_case(tmp_path, journal):
    records = watch(tmp_path, journal, "time.sleep(60)")
    assert [records[m]["status"] for m in (1, 16, 64)] == [MEASURED, FAILED, MEASURED]
    assert records[16]["reason"].startswith("hung")


_UNLESS_WITHOUT_CUDA = "if not journal.suspects(case): "


def test_a_case_is_measured_once_more_without_cuda(tmp_path, journal):
    records = watch(tmp_path, journal, _UNLESS_WITHOUT_CUDA + "os.kill(os.getpid(), signal.SIGSEGV)")
    assert [records[m]["status"] for m in (1, 16, 64)] == [MEASURED, MEASURED, MEASURED]
    (suspect,) = journal.events("suspect")
    assert (suspect["name"], suspect["what"]) == (CUDA, "d_x")
    assert suspect["key"] == Case("d_x", 1024, 4096, 16).key
    assert suspect["reason"] == "the worker died, exit code -11"
    assert journal.suspects(Case("d_x", *SQUARE, 1)) == [suspect]
    assert journal.suspects(Case("forward", *SQUARE, 1)) == []


def test_the_case_that_failed_with_cuda_says_so_and_others_say_why_it_is_missing(journal):
    culprit, next_one = Case("d_x", *SQUARE, 16), Case("d_x", *SQUARE, 64)
    journal.suspect(CUDA, culprit, "illegal address", everywhere=False)
    for case, failures, left_out in (
        (culprit, {CUDA: "illegal address"}, {}),
        (next_one, {}, {CUDA: "not tried again after d_x 4096 x 4096 M = 16: illegal address"}),
        (Case("forward", *SQUARE, 64), {}, {}),
    ):
        without, culprits = worker.without_suspects(case, journal)
        fields = {"failures": {}, "left_out": without}
        worker.blame(fields, culprits)
        assert fields == {"failures": failures, "left_out": left_out}


def test_after_a_hang_cuda_is_left_out_of_every_kind_of_case(tmp_path, journal):
    records = watch(tmp_path, journal, _UNLESS_WITHOUT_CUDA + "time.sleep(60)")
    assert records[16]["status"] == MEASURED
    assert [s["what"] for s in journal.suspects(Case("threshold", *SQUARE, detail="float32"))] == [""]


def test_a_cuda_check_that_hangs_is_not_followed_by_others(tmp_path, journal):
    planned = [Case("correctness", detail="cuda exact"), Case("correctness", detail="cuda layouts")]
    script = tmp_path / "a_worker.py"
    script.write_text(
        "import sys, time\nfrom pathlib import Path\nfrom benchmarks.gpu.cases import Case\n"
        "from benchmarks.gpu.journal import MEASURED, Journal\njournal = Journal(Path(sys.argv[1]))\n"
        "for case in (Case('correctness', detail='cuda exact'), Case('correctness', detail='cuda layouts')):\n"
        "    if case.key not in journal.records():\n        journal.started(case, 0.5)\n"
        "        if not journal.suspects(case): time.sleep(60)\n        journal.record(case, MEASURED)\n"
    )
    command.watch([sys.executable, str(script), str(journal.path)], {"PYTHONPATH": str(ROOT)}, journal, planned,
                  time.time() + 30, poll=0.02)  # fmt: skip
    assert [r["status"] for r in journal.records().values()] == [FAILED, MEASURED]
    assert len(journal.events("suspect")) == 1


def test_the_budget_ends_a_case_that_overruns_it(tmp_path, journal):
    records = watch(tmp_path, journal, "journal.started(case, 600); time.sleep(60)", seconds=2.0)
    assert records[16]["status"] == NOT_MEASURED
    assert 64 not in records


def test_a_worker_that_cannot_begin_is_not_begun_again(journal):
    command.watch([sys.executable, "-c", "raise SystemExit(7)"], {}, journal, [], 2e9, poll=0.02)
    assert journal.records() == {}


_CUT_OFF = """
import os, sys, time
from pathlib import Path
from benchmarks.gpu import __main__ as command
from benchmarks.gpu.cases import plan
from benchmarks.gpu.journal import MEASURED, Journal

out = Path(sys.argv[1])
if len(sys.argv) > 2:
    journal = Journal(Path(sys.argv[2]))
    journal.add("about", environment={"device": "a card"}, ceilings={})
    for case in plan(["d_x"], [(1024, 4096)], [1, 16, 64])[:2]:
        journal.started(case, 600)
        journal.record(case, MEASURED, samples={}, failures={})
    (out / "pid").write_text(str(os.getpid()))
    time.sleep(60)
else:
    command._has_gpu, watch = lambda: True, command.watch
    command.watch = lambda line, environment, journal, cases, deadline: watch(
        [sys.executable, __file__, str(out), str(journal.path)], environment, journal, cases, deadline
    )
    command.main(["--what", "d_x", "--shapes", "1024x4096", "--tokens", "1,16,64", "--out", str(out)])
"""


def test_what_was_measured_when_the_machine_went_away_is_on_disk(tmp_path, capsys):
    """Both processes are killed between two cases: nothing of theirs runs any more, as without power."""
    script, out = tmp_path / "cut_off.py", tmp_path / "out"
    script.write_text(_CUT_OFF)
    run = subprocess.Popen([sys.executable, str(script), str(out)], env={**os.environ, "PYTHONPATH": str(ROOT)})
    pid, patience = out / "pid", time.monotonic() + 60
    while not (pid.exists() and pid.read_text()):
        assert run.poll() is None
        assert time.monotonic() < patience
        time.sleep(0.05)
    run.kill()
    os.kill(int(pid.read_text()), signal.SIGKILL)
    run.wait()
    assert not (out / "gpu-d_x.json").exists()
    assert command.main(["--recover", str(out)]) == 0
    stored = json.loads((out / "gpu-d_x.json").read_text())
    assert [case["status"] for case in stored["cases"]] == [MEASURED, MEASURED, NOT_MEASURED]
    assert stored["environment"]["device"] == "a card"
    assert "2 of 3 cases measured" in capsys.readouterr().out
    assert command.main(["--recover", str(tmp_path)]) == 2
