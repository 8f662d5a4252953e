"""Programs that the GPU suite starts: how it finds and reads compute-sanitizer, and how it counts a pytest run."""

import importlib
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the GPU suite measures Triton kernels")

from benchmarks.gpu import programs
from benchmarks.gpu.results import FAILED, MEASURED, NOT_MEASURED, REPORTED

ROOT = Path(__file__).resolve().parents[3]

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
    found = programs.summarise(_PLAIN, 1, 60)
    assert (found["status"], found["passed"], found["failed"], found["complete"]) == (FAILED, 1, 1, True)
    assert found["complaints"][0] == "tests/a.py::test_two[x] FAILED [100%]"
    found = programs.summarise(_PARALLEL, 0, 60)
    assert (found["status"], found["passed"], found["skipped"]) == (MEASURED, 1, 1)
    found = programs.summarise(_PLAIN, None, 60)  # stopped at its time limit
    assert (found["status"], found["passed"], found["complete"]) == (FAILED, 1, False)
    assert found["complaints"][0] == "stopped after 60 s"
    assert programs.summarise("no tests ran", 5, 60)["status"] == FAILED


def test_tests_that_time_does_not_suffice_for_have_not_failed():
    reason = "stopped after 60 s, 1 passed and none failed until then"
    assert programs.summarise(_PARALLEL, None, 60) == {"status": NOT_MEASURED, "reason": reason, "passed": 1}


@pytest.mark.slow
def test_a_program_that_runs_out_of_time_ends_with_its_children(tmp_path):
    code = f"import os, time; os.fork() or time.sleep(2) or open({str(tmp_path / 'late')!r}, 'w'); time.sleep(60)"
    before = time.monotonic()
    assert programs.run_for([sys.executable, "-c", "print('said', flush=True); " + code], {}, 1.0) == ("said\n", None)
    assert time.monotonic() - before < 8
    time.sleep(2.5)
    assert not (tmp_path / "late").exists()


def a_program(path, text="exit 0"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_the_sanitizer_is_looked_for_in_path_toolkit_and_packages(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site")])
    monkeypatch.delitem(sys.modules, "nvidia", raising=False)
    nowhere = {"PATH": str(tmp_path / "empty"), "CUDA_HOME": str(tmp_path / "cuda")}
    found, why = programs.find_sanitizer(nowhere)
    assert found is None
    assert why.startswith("not found: compute-sanitizer is neither in PATH nor in ")
    package = a_program(tmp_path / "site/nvidia/cu13/compute-sanitizer/compute-sanitizer")
    importlib.invalidate_caches()
    assert programs.find_sanitizer(nowhere) == (package, "")
    toolkit = a_program(tmp_path / "cuda/bin/compute-sanitizer")
    assert programs.find_sanitizer(nowhere) == (toolkit, "")
    first = a_program(tmp_path / "bin/compute-sanitizer")
    assert programs.find_sanitizer({**nowhere, "PATH": str(tmp_path / "bin")}) == (first, "")


_END = "sanitized: 240 passed, 0 failed\n"
_CLEAN = _END + "========= ERROR SUMMARY: 0 errors\n"
_INVALID = "========= Invalid __global__ read of size 16 bytes\n=========     at mft::cuda::entry\n"
_RACES = _END + "========= RACECHECK SUMMARY: 3 hazards displayed (1 error, 2 warnings)\n"


@pytest.mark.parametrize(
    ("tool", "output", "code", "status", "reports", "complaint"),
    [
        ("memcheck", _CLEAN, 0, MEASURED, 0, None),
        ("memcheck", _INVALID + _END + "========= ERROR SUMMARY: 2 errors\n", 9, REPORTED, 2, "Invalid __global__"),
        ("memcheck", _INVALID, None, REPORTED, 1, "its program did not end: out of time"),
        ("memcheck", _INVALID + "========= ERROR SUMMARY: 1 error\n", 9, REPORTED, 1, "did not end: exit code 9"),
        ("memcheck", "wrong: masked_linear: 1 of 9\n" + _CLEAN.replace("240 passed, 0", "239 passed, 1"), 1, FAILED, 0,
         "wrong: masked_linear"),
        ("racecheck", _RACES, 9, REPORTED, 1, "RACECHECK SUMMARY"),
        ("racecheck", _RACES.replace("(1 error,", "(0 errors,"), 0, MEASURED, 0, "2 warnings"),
        ("racecheck", _RACES.replace("(1 error, 2", "(0 errors, 0"), 0, MEASURED, 0, None),
    ],
)  # fmt: skip
def test_what_the_sanitizer_says_is_not_what_is_wrong(tool, output, code, status, reports, complaint):
    found = programs.judge(tool, output, code, 60)
    assert (found["status"], found["failed"], found["reports"]) == (status, status == FAILED, reports)
    assert found["complete"] != ("did not end" in str(found["complaints"]))
    assert any(complaint in c for c in found["complaints"]) if complaint else found["complaints"] == []


@pytest.mark.parametrize(
    ("output", "code", "reason"),
    [
        ("", None, "stopped after 60 s, nothing found until then"),
        ("========= Error: Device not supported. Please refer to the documentation\n", 1, "Device not supported"),
        ("ModuleNotFoundError: No module named 'torch'\n", 1, "exit code 1: ModuleNotFoundError"),
        (_END, 0, "exit code 0"),
        ("========= ERROR SUMMARY: 0 errors\n", 0, "exit code 0"),  # from a program that checked nothing
    ],
)
def test_a_sanitizer_without_a_verdict_proves_nothing(output, code, reason):
    found = programs.judge("memcheck", output, code, 60)
    assert found["status"] == NOT_MEASURED
    assert found["unproven"]
    assert reason in found["reason"]


def test_the_sanitizer_s_program_gets_its_options_and_a_time_limit(tmp_path, monkeypatch):
    said = f'echo "$@" $PYTORCH_NO_CUDA_MEMORY_CACHING > {tmp_path / "asked"}; echo "{_CLEAN.strip()}"'
    program = a_program(tmp_path / "compute-sanitizer", said)
    monkeypatch.setattr(programs, "find_sanitizer", lambda: (program, ""))
    found = programs.sanitize("memcheck", 60)
    assert (found["status"], found["passed"]) == (MEASURED, 240)
    asked = (tmp_path / "asked").read_text()
    assert asked.startswith("--tool memcheck --kernel-name kns=3mft4cuda")
    assert asked.endswith("-m benchmarks.gpu.layouts 1\n")
    a_program(tmp_path / "compute-sanitizer", "sleep 60")
    before = time.monotonic()
    found = programs.sanitize("racecheck", 0.3)
    assert (found["status"], found["unproven"]) == (NOT_MEASURED, True)
    assert time.monotonic() - before < 8
    monkeypatch.setattr(programs, "find_sanitizer", lambda: (None, "not found: nowhere"))
    expected = {"status": NOT_MEASURED, "reason": "not found: nowhere", "unproven": True}
    assert programs.sanitize("racecheck", 60) == expected
    assert "unproven" not in programs.sanitize("racecheck", 60, dry=True)


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize("code", [0, 3])
def test_make_gpu_fails_without_the_sanitizer_s_verdict(code):
    run = subprocess.run(["make", "gpu", f"GPU_PYTHON=sh -c 'exit {code}'"], cwd=ROOT, capture_output=True, text=True)
    assert (run.returncode == 0) == (code == 0), run.stderr
