"""The CUDA kernels in the GPU suite: a wrong one is found, a missing library is said, a missing sanitizer fails it."""

import importlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="the GPU suite measures Triton kernels")

from gpu_records import CEILINGS

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import cases, correctness, device, equality, layouts, results, sanitizer, threshold, timing
from benchmarks.gpu.cases import CUDA, Case
from benchmarks.gpu.journal import FAILED, MEASURED, NOT_MEASURED, Journal
from benchmarks.gpu.kernels import OPS, OVER_CODES, OVER_EXPERTS, kernels
from mft_kernels import reference
from mft_kernels.backends import cuda
from mft_kernels.reference import grouped as reference_grouped
from mft_kernels.reference import quantized as reference_quantized

ROOT = Path(__file__).resolve().parents[3]
IN_PLACE = ("accumulate_score_grad", "accumulate_product", "grouped_score_grad")


@pytest.fixture
def exact_cuda(monkeypatch):
    """The cuda backend's functions, computed by the reference in fp32 and rounded once, as the kernels do."""

    def rounded(op, reference=reference):
        def run(*arguments):
            if op in IN_PLACE:
                sums = arguments[0].float()
                getattr(reference, op)(sums, *map(widened, arguments[1:]))
                arguments[0].copy_(sums)
                return None
            outputs = getattr(reference, op)(*map(widened, arguments))
            dtypes = [v.dtype for v in arguments if is_floating(v)]
            if isinstance(outputs, torch.Tensor):
                return outputs.to(dtypes[0]) if outputs.is_floating_point() else outputs
            kinds = [dtypes[0], dtypes[0], dtypes[3 if len(dtypes) > 3 else -1], dtypes[0]]
            return tuple(o.to(d) if is_floating(o) else o for o, d in zip(outputs, kinds))

        return run

    def is_floating(value):
        return isinstance(value, torch.Tensor) and value.is_floating_point()

    def widened(value):
        return value.float() if is_floating(value) else value

    for op in OPS:
        monkeypatch.setattr(cuda, op, rounded(op))
    for op in OVER_CODES:
        monkeypatch.setattr(cuda, op, rounded(op, reference_quantized))
    for op in OVER_EXPERTS:
        monkeypatch.setattr(cuda, op, rounded(op, reference_grouped))
    kernels.cache_clear()
    yield
    kernels.cache_clear()


DRY = SimpleNamespace(
    dry=True, torch_device=torch.device("cpu"), l2_bytes=768, without={}, graph=lambda run: run,
    synchronize=lambda: None, tidy=lambda: None,
)  # fmt: skip


def wrong_by(monkeypatch, op, change):
    """One op of the backend, its results changed."""
    right = getattr(cuda, op)
    monkeypatch.setattr(cuda, op, lambda *arguments: change(right(*arguments), *arguments))
    kernels.cache_clear()


def complaints_of(detail):
    status, fields = correctness.check(Case("correctness", detail=detail), DRY, 60)
    assert (status == FAILED) == bool(fields["complaints"])
    return fields


@pytest.mark.parametrize(("detail", "least"), zip(cases.CUDA_CHECKS, (30, 2, 3, 100)))
def test_right_kernels_pass_every_check(detail, least, exact_cuda):
    fields = complaints_of(detail)
    assert fields["complaints"] == []
    assert fields["passed"] >= least


def test_a_result_of_another_shape_is_found():
    with pytest.raises(AssertionError, match=r"output 0: shape \(1, 3\), not \(2, 3\)"):
        equality.assert_equal(lambda: torch.ones(1, 3), lambda: torch.ones(2, 3))


def flip_last(result, *arguments):
    first, *rest = result if isinstance(result, tuple) else (result,)
    first = first.clone()
    if first.numel():
        first.view(-1)[-1] += 1
    return (first, *rest) if rest else first


def add_late(result, out, *arguments):
    if out.numel():
        out.view(-1)[-1] += 1


@pytest.mark.parametrize("op", [*OPS, *OVER_CODES, *OVER_EXPERTS])
def test_one_wrong_element_of_any_op_is_found(op, exact_cuda, monkeypatch):
    wrong_by(monkeypatch, op, add_late if op in IN_PLACE else flip_last)
    found = complaints_of("cuda layouts")["complaints"]
    assert any(c.startswith(op) for c in found)
    assert any("1 of" in c for c in found)
    assert any(c.startswith(f"{op}, ") for c in complaints_of("cuda exact")["complaints"])


def test_an_element_that_nobody_writes_is_found(exact_cuda, monkeypatch):
    def unwritten(result, *arguments):
        memory = torch.empty_like(result)
        if result.numel():
            memory.view(-1)[:-1] = result.reshape(-1)[:-1]
        return memory

    wrong_by(monkeypatch, "masked_linear", unwritten)
    assert complaints_of("cuda layouts")["failed"] > 10


def test_poisoned_memory_begins_as_nan_and_the_setting_is_put_back():
    by = equality.poisoned(SimpleNamespace(name="x", op=lambda: torch.empty(4)))
    assert by.op().isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_thresholds_by_row_are_asked_for(exact_cuda, monkeypatch):
    right = cuda.masked_linear

    def first_alone(x, weight, scores, threshold, bias, mode):
        return right(x, weight, scores, threshold.reshape(-1)[0], bias, mode)

    monkeypatch.setattr(cuda, "masked_linear", first_alone)
    kernels.cache_clear()
    found = complaints_of("cuda layouts")["complaints"]
    assert found
    assert all("by row" in c for c in found)


def test_a_graph_that_does_not_read_its_inputs_again_is_found(exact_cuda):
    def once(run):
        results = run()
        return lambda: results

    layouts._graph((8, 24, 40), DRY)
    with pytest.raises(AssertionError, match="elements differ"):
        layouts._graph((8, 24, 40), SimpleNamespace(**vars(DRY) | {"graph": once}))


def test_each_check_runs_by_the_kernels_of_its_capability(exact_cuda, monkeypatch):
    monkeypatch.delenv("MFT_CUDA_CAPABILITY", raising=False)
    seen = set()
    wrong_by(monkeypatch, "pack_mask", lambda result, *a: seen.add(os.environ["MFT_CUDA_CAPABILITY"]) or result)
    complaints_of("cuda layouts")
    assert seen == {"90", "80"}
    assert "MFT_CUDA_CAPABILITY" not in os.environ


def test_without_the_library_only_cuda_is_left_out_and_says_why(monkeypatch):
    absent = {"without": {CUDA: "its library is not built"}, "compile": lambda function: function}
    device = SimpleNamespace(**vars(DRY) | absent)
    for detail in (*cases.CUDA_CHECKS, *cases.SANITIZERS):
        status, fields = correctness.check(Case("correctness", detail=detail), device, 60)
        assert (status, fields) == (NOT_MEASURED, {"reason": "without cuda: its library is not built"})
    case = Case("d_scores", 24, 40, 3)
    assert timing.without(case, device)[CUDA] == "its library is not built"
    assert CUDA not in timing.without(case, DRY)
    assert {*cases.competitors(case)} - {*timing.functions("d_scores", cases.competitors(case), device)} == {CUDA}
    device.timer = lambda *a, **k: timing.Timer("wall clock", 1, 1.0, lambda: 1.0)
    plain = SimpleNamespace(**{op: getattr(reference, op) for op in OPS})
    monkeypatch.setattr(threshold, "kernels", {cases.FUSED: plain}.__getitem__)
    fields = threshold.time_threshold(Case("threshold", 24, 40, detail="bfloat16"), device, CEILINGS)
    assert not [name for name in fields["samples"] if CUDA in name]
    assert fields["left_out"] == device.without


def test_a_wrong_kernel_is_not_timed_and_an_accumulating_one_starts_from_zero(exact_cuda, monkeypatch):
    from benchmarks.gpu.competitors import Inputs

    operands = Inputs(DRY).get(24, 40, 3, sums=True)[0]
    case = Case("accumulate", 24, 40, 3)
    runs = timing.functions("accumulate", [CUDA, cases.EAGER], DRY)
    for _ in range(2):
        assert timing._wrong(case, runs, operands, DRY) == {}
    wrong_by(monkeypatch, "accumulate_score_grad", lambda result, out, *a: out.mul_(2))
    assert "wrong: " in timing._wrong(case, runs, operands, DRY)[CUDA]


# ---------------------------------------------------------------------------------------------- compute-sanitizer


def a_program(path, text="exit 0"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_the_sanitizer_is_looked_for_in_path_toolkit_and_packages(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site")])
    monkeypatch.delitem(sys.modules, "nvidia", raising=False)
    nowhere = {"PATH": str(tmp_path / "empty"), "CUDA_HOME": str(tmp_path / "cuda")}
    found, why = sanitizer.find(nowhere)
    assert found is None
    assert why.startswith("not found: compute-sanitizer is neither in PATH nor in ")
    package = a_program(tmp_path / "site/nvidia/cu13/compute-sanitizer/compute-sanitizer")
    importlib.invalidate_caches()
    assert sanitizer.find(nowhere) == (package, "")
    toolkit = a_program(tmp_path / "cuda/bin/compute-sanitizer")
    assert sanitizer.find(nowhere) == (toolkit, "")
    first = a_program(tmp_path / "bin/compute-sanitizer")
    assert sanitizer.find({**nowhere, "PATH": str(tmp_path / "bin")}) == (first, "")


_END = "sanitized: 240 passed, 0 failed\n"
_CLEAN = _END + "========= ERROR SUMMARY: 0 errors\n"
_INVALID = "========= Invalid __global__ read of size 16 bytes\n=========     at mft::cuda::entry\n"
_RACES = _END + "========= RACECHECK SUMMARY: 3 hazards displayed (1 error, 2 warnings)\n"


@pytest.mark.parametrize(
    ("tool", "output", "code", "status", "failed", "complaint"),
    [
        ("memcheck", _CLEAN, 0, MEASURED, 0, None),
        ("memcheck", _INVALID + _END + "========= ERROR SUMMARY: 2 errors\n", 9, FAILED, 2, "Invalid __global__ read"),
        ("memcheck", _INVALID, None, FAILED, 1, "its program did not end: out of time"),
        ("memcheck", _INVALID + "========= ERROR SUMMARY: 1 error\n", 9, FAILED, 1, "did not end: exit code 9"),
        ("memcheck", "wrong: masked_linear: 1 of 9\n" + _CLEAN.replace("240 passed, 0", "239 passed, 1"), 1, FAILED, 1,
         "wrong: masked_linear"),
        ("racecheck", _RACES, 9, FAILED, 1, "RACECHECK SUMMARY"),
        ("racecheck", _RACES.replace("(1 error,", "(0 errors,"), 0, MEASURED, 0, "2 warnings"),
        ("racecheck", _RACES.replace("(1 error, 2", "(0 errors, 0"), 0, MEASURED, 0, None),
    ],
)  # fmt: skip
def test_the_sanitizer_s_verdict(tool, output, code, status, failed, complaint):
    got, fields = sanitizer.judge(tool, output, code, 60)
    assert (got, fields["failed"]) == (status, failed)
    assert fields["complete"] != ("did not end" in str(fields["complaints"]))
    assert any(complaint in c for c in fields["complaints"]) if complaint else fields["complaints"] == []


@pytest.mark.parametrize(
    ("output", "code", "reason"),
    [
        ("", None, "stopped after 60 s, nothing found until then"),
        ("========= Error: Device not supported. Please refer to the documentation\n", 1, "Device not supported"),
        ("ModuleNotFoundError: No module named 'torch'\n", 1, "exit code 1: ModuleNotFoundError"),
        (_END, 0, "exit code 0"),
        ("========= ERROR SUMMARY: 0 errors\n", 0, "exit code 0"),  # of a program that checked nothing
    ],
)
def test_a_sanitizer_without_a_verdict_proves_nothing(output, code, reason):
    status, fields = sanitizer.judge("memcheck", output, code, 60)
    assert status == NOT_MEASURED
    assert fields["unproven"]
    assert reason in fields["reason"]


def test_the_sanitizer_s_program_gets_its_options_and_a_time_limit(tmp_path, monkeypatch):
    program = a_program(tmp_path / "compute-sanitizer", f'echo "$@"; echo "{_CLEAN.strip()}"')
    monkeypatch.setattr(sanitizer, "find", lambda: (program, ""))
    status, fields = sanitizer.run("memcheck", 60)
    assert (status, fields["passed"]) == (MEASURED, 240)
    asked = " ".join(sanitizer.command(program, "memcheck"))
    assert "--tool memcheck --kernel-name kns=3mft4cuda" in asked
    assert sanitizer.environment()["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"
    a_program(tmp_path / "compute-sanitizer", "sleep 60")
    before = time.monotonic()
    status, fields = sanitizer.run("racecheck", 0.3)
    assert (status, fields["unproven"]) == (NOT_MEASURED, True)
    assert time.monotonic() - before < 8
    monkeypatch.setattr(sanitizer, "find", lambda: (None, "not found: nowhere"))
    assert sanitizer.run("racecheck", 60) == (NOT_MEASURED, {"reason": "not found: nowhere", "unproven": True})
    assert "unproven" not in sanitizer.run("racecheck", 60, dry=True)[1]


def test_a_missing_sanitizer_ends_with_exit_code_3_and_all_results_written(tmp_path, capsys):
    planned = [Case("correctness", detail=detail) for detail in ("cuda exact", "cuda memcheck")]
    for failed, code in ((0, 3), (1, 1)):
        journal, out = Journal(tmp_path / f"journal{failed}"), tmp_path / f"out{failed}"
        journal.add("about", environment={"cuda_library": "CUDA C++, sm_80 sm_90"}, ceilings=CEILINGS)
        journal.record(planned[0], FAILED if failed else MEASURED, passed=1, failed=failed, skipped=0, complaints=[])
        journal.record(planned[1], NOT_MEASURED, reason="not found: nowhere", unproven=True)
        results.write(out, journal, planned)
        assert command._summary(journal, planned, out) == code
        assert "UNPROVEN: cuda memcheck: not found: nowhere" in capsys.readouterr().out
        assert "| cuda memcheck | not measured: not found: nowhere |" in (out / "gpu.md").read_text()


def test_a_library_without_the_card_s_own_kernels_ends_with_exit_code_3(tmp_path, capsys, monkeypatch):
    """General kernels under the goals of Hopper's would be a figure of something else."""
    why = "CUTLASS's headers are missing"
    monkeypatch.setattr("mft_kernels.backends.built.report", lambda part: {"left_out": {"score_grad_sm90": why}})
    lacks = device.lacking((9, 0))
    assert lacks == [f"score_grad_sm90: {why}"]
    assert device.lacking((8, 0)) == device.lacking((10, 0)) == []
    (planned,) = [Case("correctness", detail="cuda exact")]
    journal = Journal(tmp_path / "journal")
    journal.add("about", environment={"cuda_library": "CUDA C++, sm_80", "cuda_lacks": lacks}, ceilings=CEILINGS)
    journal.record(planned, MEASURED, passed=1, failed=0, skipped=0, complaints=[])
    results.write(tmp_path, journal, [planned])
    assert command._summary(journal, [planned], tmp_path) == 3
    assert f"LACKING: this card's own score_grad_sm90: {why}; the general kernels" in capsys.readouterr().out


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize("code", [0, 3])
def test_make_gpu_fails_without_the_sanitizer_s_verdict(code):
    run = subprocess.run(["make", "gpu", f"GPU_PYTHON=sh -c 'exit {code}'"], cwd=ROOT, capture_output=True, text=True)
    assert (run.returncode == 0) == (code == 0), run.stderr


def test_a_missing_library_is_a_warning_in_the_summary_and_a_column_of_the_table(tmp_path, capsys):
    planned = [Case("correctness", detail="exact"), Case("correctness", detail="cuda exact")]
    journal = Journal(tmp_path / "journal")
    why = "its library is not built: no nvcc"
    journal.add("about", environment={"cuda_library": f"none: {why}"}, ceilings=CEILINGS)
    journal.record(planned[0], MEASURED, passed=1, failed=0, skipped=0, complaints=[])
    journal.record(planned[1], NOT_MEASURED, reason=f"without cuda: {why}")
    results.write(tmp_path, journal, planned)
    assert command._summary(journal, planned, tmp_path) == 0
    assert f"WARNING: the CUDA kernels were left out: {why}" in capsys.readouterr().out
    assert f"| none: {why} |" in (tmp_path / "gpu.md").read_text()
