"""The GPU suite's measurements and their order, its command line, and a dry run of everything."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="the GPU suite measures Triton kernels")

from gpu_records import CEILINGS, documents_of, on_host, record, results_of, sample

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import cases, choices, report, timing
from benchmarks.gpu.cases import CUDA, EVERY_SHAPE, FUSED, PASS, PLACE, SQUARE, TOKENS, WHATS, Case, plan
from benchmarks.gpu.faster_table import FASTER
from benchmarks.gpu.results import MEASURED
from mft_kernels.backends.triton import target

ROOT = Path(__file__).resolve().parents[3]


def test_every_case_is_planned_once():
    planned = plan(WHATS, EVERY_SHAPE, TOKENS)
    assert len(planned) == len(set(planned))
    timed = [case for case in planned if case.what in cases.PRODUCTS]
    assert len(timed) == 4 * 6 * 10 + 2 * 2 + 1  # accumulate: two shapes, two M; accumulate_product: one of each


def test_the_default_run_decides_first_and_ends_with_memcheck_within_nine_minutes():
    run = cases.deciding(EVERY_SHAPE, TOKENS)
    whats = list(dict.fromkeys(case.what for case in run[1:]))
    assert whats == ["forward", "d_x", "update", "d_scores", "threshold", "score_step", "train", "correctness"]
    assert (run[0].detail, run[-1].detail) == (cases.PREFLIGHT, "cuda memcheck")
    assert {case.m for case in run if case.what == "update"} == {1, 16, 256, 512, 1024, 2048}
    assert len({(case.n, case.k) for case in run if case.what == "update"}) == 2
    assert sum(case.planned for case in run) < 540
    assert cases.competitors(Case("forward", *SQUARE, 512))[:4] == choices.WAYS
    assert "0 s  correctness preflight" in cases.schedule(run)


def test_a_row_names_what_ran_what_the_model_takes_and_the_regret():
    bench = timing.Bench(on_host(without={}), CEILINGS | {"l2_rate": 36.0})
    case, ms = Case("forward", *SQUARE, 2048), dict(zip(choices.WAYS, (3.0, 1.0, 1.0, 1.5)))
    with target.assume(target.H100):
        found = choices.judged(case, {"samples": {name: sample(each) for name, each in ms.items()}}, bench)
    assert found["choice"]["ran"] == PASS
    assert found["choice"]["an op"] == {"model": PASS, "fastest": PASS, "regret": 0.0}
    assert found["choice"]["training"]["fastest"] == PLACE
    assert (found["goals"][PLACE]["goal"], found["goals"][PLACE]["met"], found["goals"][FUSED]["met"]) == (
        1,
        True,
        False,
    )
    text = report.text(documents_of(record("forward", 2048, found.pop("samples")) | found))
    assert f"| an op | {PASS} | {PASS} | {PASS} | 0 % | " in text
    assert f"{FUSED}: 3.00, not met (" in text


def test_results_go_into_one_archive(monkeypatch, tmp_path):
    """A machine may return fewer files than there are kinds of cases."""

    def measured(line, out, deadline, **how):
        assert line[-2:] == ["--out", str(out)]
        results_of(out, plan(["d_x"], [SQUARE], [64]))
        (out / "else").write_text("")
        raise KeyboardInterrupt  # the lease ends

    monkeypatch.setattr(command, "_has_gpu", lambda: True)
    monkeypatch.setattr(command, "measure", measured)
    with pytest.raises(KeyboardInterrupt):
        command.main(["--out", str(tmp_path / "a" / "results.zip"), "--what", "d_x"])
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["results.zip"]
    with zipfile.ZipFile(tmp_path / "a" / "results.zip") as packed:
        assert packed.namelist() == ["gpu-d_x.json"]


def test_a_slice_holds_what_was_asked_for_alone():
    planned = plan(["d_x"], [(1024, 4096)], [64, 3])
    assert set(planned) == {Case("d_x", 1024, 4096, 64), Case("d_x", 1024, 4096, 3)}
    assert plan(["accumulate"], [(1024, 4096)], [64]) == [Case("accumulate", 1024, 4096, 64)]


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


@pytest.mark.slow
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
    without_cuda = cuda.startswith("none: ")  # if the emulator cannot be compiled here
    assert ("WARNING: the CUDA kernels were left out: " in run.stdout) == without_cuda
    assert table is None if without_cuda else table["capability"] is None  # a dry run has no card
    for document in written.values():
        assert document["environment"]["torch"] == torch.__version__
        for case in document["cases"]:
            elsewhere = case["detail"] in cases.SANITIZERS
            if not elsewhere and not (without_cuda and case["detail"].startswith(CUDA)):
                assert case["status"] == MEASURED, case
                assert not case.get("failures"), case
    (timed,) = written["gpu-step.json"]["cases"]
    expected = {*cases.competitors(Case("step", *cases.DRY_SHAPE, cases.DRY_TOKENS))}
    assert timed["samples"].keys() == expected - ({CUDA, cases.CUDA_PACKED} if without_cuda else set())
    if without_cuda:
        pytest.skip(f"walked without the CUDA kernels: {cuda}")
