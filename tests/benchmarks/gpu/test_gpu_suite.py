"""The GPU suite's measurements and their order, its command line, and a dry run of everything."""

import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="the GPU suite measures Triton kernels")

from gpu_records import results_of

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import cases, products, timing
from benchmarks.gpu.cases import CUDA, EVERY_SHAPE, PAPER, SHAPES, SQUARE, TOKENS, WHATS, Case, plan
from benchmarks.gpu.faster_table import FASTER
from benchmarks.gpu.results import MEASURED

ROOT = Path(__file__).resolve().parents[3]


def test_every_case_is_planned_once():
    planned = plan(WHATS, EVERY_SHAPE, TOKENS)
    assert len(planned) == len(set(planned))
    timed = [case for case in planned if case.what in cases.PRODUCTS]
    assert len(timed) == 4 * 6 * 9 + 2 * 2 + 1  # accumulate: two shapes, two M; accumulate_product: one of each


def test_the_first_lease_holds_checks_headline_and_memcheck_and_fits_its_time():
    every = plan(WHATS, EVERY_SHAPE, TOKENS)
    first = cases.within(every, command.BUDGET)
    assert sum(case.guess for case in first) < command.BUDGET < sum(case.guess for case in every)
    assert first[0].detail == "cuda layouts"
    assert {case.detail for case in first[:8]} == {
        f"{by}{kind}" for by in ("", "cuda ") for kind in ("exact", "random", "repeats")
    } | {"other ops", "cuda layouts"}
    assert first[8:13] == list(cases.HEADLINE)
    assert first[13].detail == "cuda memcheck"
    assert [case for case in first if cases.COMPILED in cases.competitors(case)] == [cases.HEADLINE[0]]
    assert not {"train", "experts", "memory"} & {case.what for case in first}  # these have slices of their own
    # First what decodes, also with packed masks, and with a mask per row; then the hardest goals of CUDA's kernels.
    few = {(case.what, case.m) for case in first[14:23]}
    assert few == {(what, m) for what in ("forward", "step", "many") for m in (1, 16, 64)}
    assert {(c.m, c.n, c.k) for c in first[23:29]} == {(4096, *s) for s in SHAPES["llama2-7b"][1:]}


def test_a_longer_time_or_a_slice_takes_the_rest(monkeypatch, capsys, tmp_path):
    every = plan(WHATS, EVERY_SHAPE, TOKENS)
    assert cases.within(every, sum(case.guess for case in every) + 60) == every
    assert {case.what for case in every} == {*WHATS}
    assert {case.what for case in cases.within(plan(["train"], EVERY_SHAPE, TOKENS), command.BUDGET)} == {"train"}
    monkeypatch.setattr(command, "_has_gpu", lambda: True)
    monkeypatch.setattr(command, "measure", lambda *_, **__: True)
    command.main(["--out", str(tmp_path), "--what", "train,step"])
    said = capsys.readouterr().out
    assert re.match(r"\d+ of 66 cases are left out: all are expected to take \d+ s, and --budget is 500; a slice", said)


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


def test_cuda_takes_part_beside_triton_wherever_it_serves_what_is_timed():
    planned = plan(WHATS, EVERY_SHAPE, TOKENS)
    assert {case.what for case in planned if cases.is_beside_others(case)} == {*cases.PRODUCTS, "memory", "threshold"}
    for case in (case for case in planned if case.what in (*cases.PRODUCTS, "memory")):
        assert {CUDA, cases.FUSED, cases.DENSE} <= {*cases.competitors(case)}


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
    def work(what, keep_bytes):  # 2 tokens, N = 8, K = 4: 32 weights, x 16 bytes, y 32 bytes
        return products.work(Case(what, 8, 4, 2), keep_bytes)

    assert work("forward", 2.0) == [(32 * 4 + 16 + 32, 128)]
    assert work("forward", 0.0) == [(32 * 2 + 16 + 32, 128)]
    assert work("d_scores", 2.0) == [(32 * 6 + 16 + 32, 128)]
    assert work("d_scores", 0.0) == [(32 * 2 + 16 + 32, 128)]
    assert work("accumulate", 2.0) == [(32 * 12 + 16 + 32, 128)]
    assert work("accumulate", 0.0) == work("accumulate_product", 2.0) == [(32 * 8 + 16 + 32, 128)]
    assert work("step", 2.0)[1] == (32 * 6 + 2 * 16 + 32, 256)
    assert timing.floor_ms([(10.0, 1.0), (1.0, 30.0)], 1e3, 1e3) == (11.0, 31.0, 40.0)


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
    assert "## Goals" in (tmp_path / "gpu.md").read_text()
    if without_cuda:
        pytest.skip(f"walked without the CUDA kernels: {cuda}")
