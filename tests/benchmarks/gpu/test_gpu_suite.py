"""What the GPU suite measures and in which order, its command line, and a dry run of it all."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="the GPU suite measures Triton kernels")

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import cases
from benchmarks.gpu.cases import CUDA, PAPER, SHAPES, SQUARE, TOKENS, WHATS, Case, plan
from benchmarks.gpu.faster_table import FASTER
from benchmarks.gpu.journal import MEASURED

ROOT = Path(__file__).resolve().parents[3]
EVERY_SHAPE = [shape for shapes in SHAPES.values() for shape in shapes]


def test_every_case_is_planned_once():
    planned = plan(WHATS, EVERY_SHAPE, TOKENS)
    assert len(planned) == len(set(planned)) == len({case.key for case in planned})
    products = [case for case in planned if case.what in cases.PRODUCTS]
    assert len(products) == 4 * 6 * 9 + 2 * 2  # accumulate: two shapes, two M


def test_the_first_two_minutes_are_correctness_and_a_figure_for_each_goal():
    from benchmarks.gpu.worker import Estimates

    planned = plan(WHATS, EVERY_SHAPE, TOKENS)
    assert [case.detail for case in planned[:4]] == ["exact", "cuda exact", "random", "cuda random"]
    assert planned[4:9] == list(cases.HEADLINE)
    assert sum(map(Estimates().of, planned[:9])) < 120  # by the guesses of what compiling takes


def test_then_come_the_other_checks_the_goals_and_the_rest():
    planned = plan(WHATS, EVERY_SHAPE, TOKENS)
    behind = planned[9:]
    assert [case.detail for case in behind[:3]] == ["repeats", "cuda repeats", "cuda layouts"]
    behind = behind[3:]
    hardest = 3 * 2  # forward, d_x and d_scores of CUDA's goals, on three shapes, one of which is in the headline
    assert {(case.m, case.n, case.k) for case in behind[:hardest]} == {(4096, *s) for s in SHAPES["llama2-7b"][1:]}
    behind = behind[hardest:]
    few = [case for case in behind if case.what == "host"]
    assert behind[: len(few)] == few
    assert {case.m for case in few} == {1, 2, 4, 8, 16, 32, 64}
    behind = behind[len(few) :]
    assert [case.detail for case in behind[:3]] == ["score_step", "accumulate_product", "held"]
    behind = behind[3:]
    assert [(case.m, case.detail) for case in behind[:12]] == [(m, d) for m in (1, 64, 512) for d in cases.CODES]
    behind = behind[12:]
    assert [(case.m, case.detail) for case in behind[:6]] == [(m, d) for m in (16384, 512) for d in cases.OVER_EXPERTS]
    behind = behind[6:]
    steps = 3 * 4  # models, ways of running
    assert {case.what for case in behind[:steps]} == {"train"}
    behind = behind[steps:]
    assert [case.what for case in behind[:6]] == ["sweep"] * 5 + ["forward"]
    behind = behind[5:]
    goal_cases = 5 * 2 * 4 - 1  # shapes, 2048 and 512 tokens, products
    assert behind[0] == Case("forward", 4096, 4096, 2048)
    assert {case.m for case in behind[:goal_cases]} == {2048, 512}
    behind = behind[goal_cases:]
    assert {case.m for case in behind[: 2 * 9]} == {8192, 16384}
    behind = behind[2 * 9 :]
    assert [case.detail for case in behind[:3]] == ["cuda memcheck", "cuda racecheck", "tests"]
    assert [case.what for case in behind[3:14]] == ["accumulate"] * 4 + ["memory"] * 4 + ["threshold"] * 3
    assert behind[14] == Case("step", 4096, 4096, 1024)


def test_cuda_takes_part_beside_triton_wherever_something_is_timed():
    timed = [what for what in WHATS if what not in ("correctness", "host", "train", "sweep")]  # there auto alone is
    for case in plan(timed, EVERY_SHAPE, TOKENS):
        assert cases.takes_part(CUDA, case)
        beside = {CUDA, cases.FUSED, cases.DENSE, cases.PASS}
        assert case.what in ("threshold", "updates", "codes", "experts") or beside <= {*cases.competitors(case)}


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
    assert cases.work("accumulate", 8, 4, 2, 2.0) == [(32 * 12 + 16 + 32, 128)]
    assert cases.work("accumulate", 8, 4, 2, 0.0) == [(32 * 8 + 16 + 32, 128)]
    assert cases.work("step", 8, 4, 2, 2.0)[1] == (32 * 6 + 2 * 16 + 32, 256)
    assert cases.floor_ms([(10.0, 1.0), (1.0, 30.0)], 1e3, 1e3) == (11.0, 31.0, 40.0)


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


def test_a_dry_run_writes_nothing_among_the_stored_results(capsys):
    with pytest.raises(SystemExit):
        command.parse(["--dry-run", "--out", str(command.RESULTS / "gpu")])
    assert "--out must be elsewhere in a dry run" in capsys.readouterr().err


def test_a_dry_run_walks_through_everything(tmp_path):
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--dry-run", "--out", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, timeout=550,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stderr == ""
    written = {path.name: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    table = written.pop(FASTER, None)
    assert written.keys() == {f"gpu-{what}.json" for what in WHATS}
    cuda = written["gpu-step.json"]["environment"]["cuda_library"]
    without_cuda = cuda.startswith("none: ")  # the emulator cannot be compiled here
    assert ("WARNING: the CUDA kernels were left out: " in run.stdout) == without_cuda
    assert table is None if without_cuda else table["capability"] is None  # of no card
    for document in written.values():
        assert document["environment"]["torch"] == torch.__version__
        for case in document["cases"]:
            elsewhere = case["detail"] in ("tests", *cases.SANITIZERS)  # the tests' own run is not repeated
            if not elsewhere and not (without_cuda and case["detail"].startswith(CUDA)):
                assert case["status"] == MEASURED, case
                assert not case.get("failures"), case
    (timed,) = written["gpu-step.json"]["cases"]
    expected = {*cases.competitors(Case("step", *cases.DRY_SHAPE, cases.DRY_TOKENS))}
    assert timed["samples"].keys() == expected - ({CUDA} if without_cuda else set())
    assert "## Goals" in (tmp_path / "gpu.md").read_text()
    if without_cuda:
        pytest.skip(f"walked without the CUDA kernels: {cuda}")
