"""The GPU suite without a GPU: what comes first, what a budget leaves out, what is written, and a dry run of it all."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="the GPU suite measures Triton kernels")

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import cases, results, tables, worker
from benchmarks.gpu.cases import AUTO, DENSE, FUSED, KEPT, PAPER, PASS, SHAPES, SQUARE, TOKENS, WHATS, Case, plan
from benchmarks.gpu.device import Gpu, Timer
from benchmarks.gpu.goals import goals
from benchmarks.gpu.journal import FAILED, MEASURED, NOT_MEASURED, Journal

ROOT = Path(__file__).resolve().parent.parent
EVERY_SHAPE = [shape for shapes in SHAPES.values() for shape in shapes]
CEILINGS = {"bytes_per_second": 3e12, "flops_per_second": 8e14}


class Clock:
    """Stands still unless it is told otherwise."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def journal(tmp_path):
    return Journal(tmp_path / "journal")


def sample(ms, *, of_cublas=100.0, floor=0.0):
    spread = {"median": ms, "low": ms, "high": ms}
    return {
        "method": "graph", "calls": 1, "ms": spread, "rounds_ms": [ms] * 3, "floor_ms": floor,
        "percent_of_byte_floor": 50.0, "percent_of_flop_floor": 60.0,
        "percent_of_cublas": {"median": of_cublas, "low": of_cublas, "high": of_cublas},
    }  # fmt: skip


def record(what, m, samples, shape=SQUARE):
    return {"what": what, "n": shape[0], "k": shape[1], "m": m, "detail": "", "status": MEASURED, "samples": samples,
            "failures": {}, "left_out": {}}  # fmt: skip


def test_every_case_is_planned_once():
    planned = plan(WHATS, EVERY_SHAPE, TOKENS)
    assert len(planned) == len(set(planned)) == len({case.key for case in planned})
    products = [case for case in planned if case.what in cases.PRODUCTS]
    assert len(products) == 4 * 6 * 9


def test_correctness_comes_first_then_the_goals_then_the_rest():
    planned = plan(WHATS, EVERY_SHAPE, TOKENS)
    assert [case.detail for case in planned[:4]] == ["exact", "random", "repeats", "tests"]
    assert planned[4] == Case("step", 4096, 4096, 2048)
    goal_cases = 5 * 2 * 4  # shapes, 2048 and 512 tokens, products
    assert {case.m for case in planned[4 : 4 + goal_cases]} == {2048, 512}
    behind = planned[4 + goal_cases :]
    assert [case.what for case in behind[:8]] == ["memory"] * 4 + ["threshold"] * 4
    assert behind[8] == Case("step", 4096, 4096, 1024)


def test_a_slice_holds_what_was_asked_for_alone():
    planned = plan(["d_x"], [(1024, 4096)], [64, 3])
    assert planned == [Case("d_x", 1024, 4096, 64), Case("d_x", 1024, 4096, 3)]
    assert plan(["memory"], [(1024, 4096)], [64]) == [Case("memory", 1024, 4096, 64)]


def test_what_a_case_leaves_out_says_why():
    many = Case("step", 11008, 4096, 4096)
    assert cases.left_out(many).keys() == {cases.COMPILED, PAPER}
    assert PAPER not in cases.competitors(many)
    assert cases.left_out(Case("step", *SQUARE, 2048)) == {}


def test_floors_count_every_byte_once():
    # 2 tokens, N = 8, K = 4: 32 weights, x 16 bytes, y 32 bytes.
    assert cases.work("forward", 8, 4, 2, 2.0) == [(32 * 4 + 16 + 32, 128)]
    assert cases.work("forward", 8, 4, 2, 0.0) == [(32 * 2 + 16 + 32, 128)]
    assert cases.work("d_scores", 8, 4, 2, 2.0) == [(32 * 6 + 16 + 32, 128)]
    assert cases.work("d_scores", 8, 4, 2, 0.0) == [(32 * 2 + 16 + 32, 128)]
    assert cases.work("step", 8, 4, 2, 2.0)[1] == (32 * 6 + 2 * 16 + 32, 256)
    assert cases.floor_ms([(10.0, 1.0), (1.0, 30.0)], 1e3, 1e3) == (11.0, 31.0, 40.0)


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
    allowed = {}

    def measure(case, seconds):
        allowed[case.detail] = seconds
        return MEASURED, {"passed": 1, "failed": 0, "skipped": 0}

    planned = plan(["correctness", "forward"], EVERY_SHAPE, TOKENS)
    for some in (planned, planned[:4]):
        fresh = Journal(journal.path.with_name(str(len(some))))
        worker.run_cases(some, measure, fresh, budget=500.0, deadline=1500.0, clock=Clock(), say=lambda line: None)
        assert allowed["tests"] == pytest.approx(500 - 0.65 * 500 if len(some) > 4 else 500, abs=150)
    assert allowed["tests"] == 500


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


def watch(tmp_path, journal, ending, seconds=60.0):
    script = tmp_path / "a_worker.py"
    script.write_text(_WORKER.format(ending=ending))
    planned = plan(["d_x"], [(1024, 4096)], [1, 16, 64])
    environment = {"PYTHONPATH": str(ROOT)}
    command_line = [sys.executable, str(script), str(journal.path)]
    import time

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


def test_the_budget_ends_a_case_that_overruns_it(tmp_path, journal):
    records = watch(tmp_path, journal, "journal.started(case, 600); time.sleep(60)", seconds=2.0)
    assert records[16]["status"] == NOT_MEASURED
    assert 64 not in records


def test_a_worker_that_cannot_begin_is_not_begun_again(journal):
    command.watch([sys.executable, "-c", "raise SystemExit(7)"], {}, journal, [], 2e9, poll=0.02)
    assert journal.records() == {}


def step(m, auto, passes, kept, paper=100.0, shape=SQUARE):
    times = {DENSE: 1.0, AUTO: auto, PASS: passes, KEPT: kept, PAPER: paper}
    return record("step", m, {name: sample(ms) for name, ms in times.items()}, shape)


def test_a_goal_takes_the_worst_case():
    found = goals("step", [step(2048, 1.0, 1.5, 1.4), step(2048, 1.0, 1.4, 1.2, paper=4.0, shape=(1024, 4096))])
    assert [goal["state"] for goal in found] == ["met", "NOT MET", "met", "NOT MET"]
    assert found[1]["measured"]["median"] == pytest.approx(1.2)
    assert "worst of 2, 1024 x 4096, M = 2048" in found[1]["quantity"]


def test_never_slower_compares_with_the_faster_rival():
    states = [goals("step", [step(16, 1.0, 1.5, kept)])[2]["state"] for kept in (0.9, 0.995)]
    assert states == ["NOT MET", "met"]


def test_what_nobody_measured_is_neither_met_nor_missed():
    for what in ("forward", "d_x", "d_scores", "step", "correctness"):
        for goal in goals(what, []):
            assert (goal["state"], goal["met"], goal["measured"]) == (NOT_MEASURED, None, None)
    assert goals("memory", []) == []


def test_cublas_is_the_goal_only_where_the_bytes_allow_it():
    slow = {DENSE: sample(1.0), FUSED: sample(2.0, of_cublas=50, floor=1.5)}  # no kernel could reach 90 %
    fast = {DENSE: sample(1.0), FUSED: sample(1.05, of_cublas=95, floor=0.5)}
    (goal,) = goals("forward", [record("forward", 1, slow), record("forward", 2048, fast)])
    assert goal["state"] == "met"
    assert "1 of 2 cases left out" in goal["quantity"]


def test_one_failed_check_misses_the_goal_and_a_missing_one_leaves_it_open():
    passed = {"detail": "exact", "passed": 3, "failed": 0, "skipped": 0, "status": MEASURED}
    missing = {"detail": "tests", "status": NOT_MEASURED, "reason": "no time"}
    assert goals("correctness", [passed])[0]["state"] == "met"
    assert goals("correctness", [passed, {**passed, "failed": 1}])[0]["state"] == "NOT MET"
    assert goals("correctness", [passed, {**passed, "complete": False}])[0]["state"] == "NOT MET"
    assert goals("correctness", [passed, missing])[0]["state"] == NOT_MEASURED
    assert goals("correctness", [{**passed, "failed": 2}, missing])[0]["state"] == "NOT MET"


def test_tables_come_from_the_json_alone(journal, tmp_path):
    planned = plan(["correctness", "step", "memory", "threshold"], [SQUARE], [2048, 8192])
    environment = {"device": "a card", "commit": "0123456789abcdef", "date": "today"}
    journal.add("about", environment=environment, ceilings=CEILINGS)
    by_what = {case.what: case for case in reversed(planned)}
    journal.record(planned[0], FAILED, passed=7, failed=1, skipped=0, complaints=["masked_linear: 3 elements differ"])
    fields = {k: v for k, v in step(2048, 1.0, 1.5, 1.4).items() if k in ("samples", "left_out")}
    fields["samples"][PAPER] |= {"method": "queued", "note": "its host code cannot be captured"}
    journal.record(by_what["step"], MEASURED, failures={FUSED: "wrong: 0.5 from the eager form"}, **fields)
    memory = {"peak_bytes": 3_000_000, "result_bytes": 1_000_000, "beyond_results_of_weight": 0.5}
    journal.record(by_what["memory"], MEASURED, samples={DENSE: memory}, weight_bytes=4_000_000)
    fast = sample(0.1) | {"times_faster_than_sort": 12.5}
    journal.record(by_what["threshold"], MEASURED, samples={"kept_threshold": fast})
    results.write(tmp_path, journal, planned)
    text = (tmp_path / "gpu.md").read_text()
    for expected in (
        "| correctness, step, memory, threshold | a card |",
        "| 0123456789ab |",
        "| 3.00 | 800 |",
        "| mask pass + cuBLAS / auto, M = 2048: worst of 1, 4096 x 4096, M = 2048 | 1.500 [1.500, 1.500] x |",
        "| exact | 7 | 1 | 0 |",
        "- masked_linear: 3 elements differ (exact)",
        "### step, N = 4096, K = 4096",
        "| 8192 | not measured | not measured |",
        "100 [100, 100] (q), 100 % |",
        "- fused FAILED: wrong: 0.5 from the eager form (4096 x 4096, M = 2048)",
        "- paper's layer was not captured: its host code cannot be captured",
        "| 4096 x 4096, M = 2048 | cuBLAS, unmasked | 3.0 | 1.0 | 50 | 4.0 |",
        "| 16.8M bfloat16 | kept_threshold | 0.1 [0.1, 0.1] | 12.5 | 50 |",
    ):
        assert expected in text, expected
    stored = json.loads((tmp_path / "gpu-step.json").read_text())
    assert stored["environment"]["device"] == "a card"
    assert [case["status"] for case in stored["cases"]] == [MEASURED, NOT_MEASURED]
    assert stored["cases"][0]["samples"][AUTO]["ms"] == {"median": 1.0, "low": 1.0, "high": 1.0}
    documents = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("gpu-*.json"))]
    assert "16.8M" in tables.markdown(documents)


def test_a_slice_leaves_other_results_alone(journal, tmp_path):
    journal.add("about", environment={"device": "a card"}, ceilings=CEILINGS)
    for what in ("forward", "d_x"):
        planned = plan([what], [SQUARE], [64])
        journal.record(planned[0], MEASURED, samples={DENSE: sample(1.0)})
        results.write(tmp_path, journal, planned)
    text = (tmp_path / "gpu.md").read_text()
    assert "## Forward" in text
    assert "## d_x" in text


_PLAIN = """
tests/a.py::test_one PASSED      [ 50%]
tests/a.py::test_two[x] FAILED   [100%]
E   assert 1 == 2
FAILED tests/a.py::test_two[x] - assert 1 == 2
"""
_PARALLEL = """
tests/a.py::test_one
[gw0] [ 50%] PASSED tests/a.py::test_one
[gw1] [100%] SKIPPED tests/a.py::test_three
"""


def test_outcomes_are_counted_line_by_line():
    from benchmarks.gpu.correctness import summarise

    status, fields = summarise(_PLAIN, 1, 60)
    assert (status, fields["passed"], fields["failed"], fields["complete"]) == (FAILED, 1, 1, True)
    assert fields["complaints"][0] == "tests/a.py::test_two[x] FAILED [100%]"
    status, fields = summarise(_PARALLEL, 0, 60)
    assert (status, fields["passed"], fields["skipped"]) == (MEASURED, 1, 1)
    status, fields = summarise(_PARALLEL, None, 60)
    assert (status, fields["passed"], fields["complete"]) == (FAILED, 1, False)
    assert fields["complaints"] == ["stopped after 60 s"]
    assert summarise("no tests ran", 5, 60)[0] == FAILED


class Card:
    """Stands in for torch.cuda: every call on a stream takes ``ms`` of its time."""

    def __init__(self, monkeypatch, capture_fails=False):
        self.now, card = 0.0, self
        self.log: list = []

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = card.now

            def synchronize(self):
                card.log.append("wait")

            def elapsed_time(self, end):
                return end.at - self.at or 1.0

        class Graph:
            calls: list = []  # noqa: RUF012

            def replay(self):
                card.log.append(f"replay {len(self.calls)}")
                for ms in self.calls:
                    card.now += ms

        class Capture:
            def __init__(self, graph, *, stream, capture_error_mode):
                self.graph = graph

            def __enter__(self):
                self.before, card.recorded = card.now, []

            def __exit__(self, *error):
                self.graph.calls, card.recorded = card.recorded, None
                if capture_fails:
                    raise RuntimeError("operation not permitted when stream is capturing\nand more")

        self.recorded = None
        for name, value in {
            "current_device": lambda: 0,
            "get_device_properties": lambda device: type(
                "Properties", (), {"L2_cache_size": 1 << 20, "multi_processor_count": 132, "total_memory": 80 << 30}
            ),
            "Stream": object,
            "set_stream": lambda stream: None,
            "synchronize": lambda: None,
            "Event": Event,
            "CUDAGraph": Graph,
            "graph": Capture,
            "_sleep": lambda cycles: None,
            "get_device_name": lambda device: "a card",
            "empty_cache": lambda: None,
            "reset_peak_memory_stats": lambda: None,
            "memory_allocated": lambda: 1000,
            "max_memory_allocated": lambda: 1500,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)

    def work(self, ms):
        def call(copy):
            self.log.append(copy)
            if self.recorded is None:
                self.now += ms
            else:
                self.recorded.append(ms)

        return call


def test_a_graph_holds_whole_rotations_over_the_copies(monkeypatch):
    card = Card(monkeypatch)
    timer = Gpu().timer(card.work(0.5), 3, capture=True)
    assert (timer.method, timer.calls) == ("graph", 6)  # 4 calls would last 2 ms
    assert timer.replay() == pytest.approx(0.5)
    assert card.log[-2:] == ["replay 6", "wait"]
    assert Gpu().timer(card.work(7.0), 3, capture=True).calls == 1


def test_what_cannot_be_captured_queues_up_instead_and_says_why(monkeypatch):
    card = Card(monkeypatch, capture_fails=True)
    timer = Gpu().timer(card.work(0.5), 3, capture=True)
    assert (timer.method, timer.calls) == ("queued", 6)
    assert timer.note == "operation not permitted when stream is capturing"
    assert timer.replay() == pytest.approx(0.5)
    assert Gpu().timer(card.work(0.5), 3, capture=False).note == "its host code cannot be captured"


def test_the_card_is_described_and_its_ceilings_and_peaks_are_measured(monkeypatch):
    from mft_kernels.triton import target

    Card(monkeypatch)
    gpu = Gpu()
    with target.assume(target.H100):
        described = gpu.environment()
    assert (described["device"], described["l2_mib"], described["target"]) == ("a card", 1.0, "sm_90")
    gpu.tidy()
    gpu.torch_device = torch.device("cpu")
    assert gpu._copy_rate(64) > 0
    assert gpu._product_rate(8) > 0
    assert gpu.peak(lambda: [torch.zeros(10), torch.zeros(15)]) == (500, 100)


def test_the_slowest_take_part_in_the_first_rounds_alone():
    from benchmarks.gpu.timing import in_rounds

    timers = {"fast": Timer("graph", 1, 1.0, lambda: 1.0), "slow": Timer("queued", 1, 400.0, lambda: 400.0)}
    assert {name: len(v) for name, v in in_rounds(timers, 11).items()} == {"fast": 11, "slow": 3}


def test_an_unknown_argument_names_the_nearest_right_one(capsys):
    for arguments, expected in (
        (["--what", "foward"], "got 'foward'; did you mean 'forward'?"),
        (["--shapes", "4096by4096"], "must be NxK, or one of llama2-7b, llama3.1-8b, got '4096by4096'"),
        (["--tokens", "0"], "must be a positive integer, got '0'"),
    ):
        with pytest.raises(SystemExit) as exit_:
            command.parse(arguments)
        assert exit_.value.code == 2
        assert expected in capsys.readouterr().err


def test_models_and_sizes_are_both_shapes():
    asked = command.parse(["--shapes", "llama3.1-8b,512x1024", "--tokens", "7", "--what", "step,d_x"])
    assert asked.shapes == [*SHAPES["llama3.1-8b"], (512, 1024)]
    assert (asked.tokens, asked.what) == ([7], ["step", "d_x"])


def test_without_a_gpu_the_command_says_so_and_leaves(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main(["--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_walks_through_everything(tmp_path):
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--dry-run", "--out", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stderr == ""
    written = {path.name: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert written.keys() == {f"gpu-{what}.json" for what in WHATS}
    for document in written.values():
        assert document["environment"]["torch"] == torch.__version__
        for case in document["cases"]:
            if case["detail"] != "tests":  # the tests' own run is not repeated
                assert case["status"] == MEASURED, case
                assert not case.get("failures"), case
    (timed,) = written["gpu-step.json"]["cases"]
    assert timed["samples"].keys() == set(cases.competitors(Case("step", *cases.DRY_SHAPE, cases.DRY_TOKENS)))
    assert "## Goals" in (tmp_path / "gpu.md").read_text()
