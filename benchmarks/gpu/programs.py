"""Programs that run in their own process: the tests of Triton's kernels, and compute-sanitizer over csrc/cuda.

The sanitizer's memcheck and racecheck run layouts.few. If the tool is missing, cannot serve the GPU or has no time to
end, nothing is proven: the record says "unproven", and so does the suite's exit code.
"""

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..records import ROOT
from .results import FAILED, MEASURED, NOT_MEASURED, REPORTED

SANITIZER = "compute-sanitizer"
_TESTS = ("tests/triton_kernels", "tests/ops")
#: Tests of a dry run: what a GPU does and the interpreter does not, on a driver that launches nothing. Graphs are
#: captured, and a hanging case is ended.
_SUITE_TESTS = "tests/benchmarks/gpu"
_DRY_TESTS = (
    f"{_SUITE_TESTS}/test_gpu_timing.py",
    f"{_SUITE_TESTS}/test_gpu_runs.py::test_a_cuda_check_that_hangs_is_not_followed_by_others",
)  # fmt: skip
_OUTCOME = re.compile(r"\b(PASSED|FAILED|SKIPPED|ERROR|XFAIL|XPASS)\b")
#: Only kernels in namespace mft::cuda are checked; torch's own would take most of the time.
_OURS = "kns=3mft4cuda"
#: The tool's last words: the number of errors, and for racecheck the number of warnings.
_VERDICT = {
    "memcheck": re.compile(r"ERROR SUMMARY: (?P<errors>\d+) error"),
    "racecheck": re.compile(r"RACECHECK SUMMARY: \d+ hazards? displayed \((?P<errors>\d+) errors?, (?P<warnings>\d+)"),
}
_FOUND = re.compile(r"^=+ (Invalid|Error|Warning|Illegal|Misaligned|Barrier|Program hit)", re.MULTILINE)
#: Messages of a tool that has checked nothing.
_UNABLE = re.compile(r"Device not supported|Internal Sanitizer Error|terminated before first instrumented API call")
_CHECKED = re.compile(r"^sanitized: (\d+) passed, (\d+) failed$", re.MULTILINE)


def run_for(
    command: Sequence[str], environment: Mapping[str, str], seconds: float, *, shown: bool = False
) -> tuple[str, int | None]:
    """Return (output, exit code or None if it was stopped). Its children end with it; ``shown``: print the output."""
    pipes = {} if shown else {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, text=True, process_group=0, **pipes)
    try:
        return process.communicate(timeout=max(seconds, 0.0))[0] or "", process.returncode
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return process.communicate()[0] or "", None
    finally:
        if process.poll() is None:  # this process was stopped while it waited
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


# ---------------------------------------------------------------------------------------------- Triton's tests


def run_tests(seconds: float, *, dry: bool = False) -> dict[str, Any]:
    """Return status, counts and complaints of a case; an interrupted run counts as far as it came."""
    if missing := [folder for folder in (*_TESTS, _SUITE_TESTS) if not Path(ROOT, folder).is_dir()]:
        return {"status": NOT_MEASURED, "reason": f"no tests in {missing[0]}"}
    tests = _DRY_TESTS if dry else (*_TESTS, "-k", "triton")
    command = [sys.executable, "-m", "pytest", *tests, "-v", "--tb=short", "-p", "no:cacheprovider"]
    # Plugins that the project's pytest options need may be missing here, and other installed packages may warn.
    command += ["-o", "addopts=--strict-markers"]
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    environment.pop("TRITON_INTERPRET", None)  # a dry run's own; its tests treat Triton as a GPU's
    if not dry and importlib.util.find_spec("xdist"):  # most of the time goes into compiling
        command += ["-p", "xdist.plugin", "-n", str(max(1, min(8, (os.cpu_count() or 1) // 2)))]
    output, code = run_for(command, environment, seconds)
    return summarise(output, code, seconds)


def summarise(output: str, code: int | None, seconds: float) -> dict[str, Any]:
    """Summarise the output of pytest -v, line by line; ``code`` is None if it ran out of time."""
    lines = output.splitlines()
    outcomes = [(found.group(1), line) for line in lines if "::" in line and (found := _OUTCOME.search(line))]
    # The short summary at the end names failures a second time.
    outcomes = [(what, line) for what, line in outcomes if not line.startswith(("FAILED ", "ERROR ", "SKIPPED "))]
    counts = Counter(what for what, _ in outcomes)
    bad = [" ".join(line.split()) for what, line in outcomes if what in ("FAILED", "ERROR", "XPASS")]
    complaints = [*bad[:40], *[line for line in lines if line.startswith(("FAILED ", "ERROR ", "E  "))][:40]]
    if code is None and not bad:
        reason = f"stopped after {seconds:.0f} s, {counts['PASSED']} passed and none failed until then"
        return {"status": NOT_MEASURED, "reason": reason, "passed": counts["PASSED"]}
    if code is None:
        complaints.insert(0, f"stopped after {seconds:.0f} s")
    elif code not in (0, 1):
        complaints.insert(0, f"pytest exited with {code}: {' '.join(lines[-3:])[:300]}")
    return {
        "status": MEASURED if code == 0 and counts["PASSED"] and not bad else FAILED,
        "passed": counts["PASSED"],
        "failed": len(bad),
        "skipped": counts["SKIPPED"] + counts["XFAIL"],
        "complaints": complaints,
        "complete": code in (0, 1),
    }


# ---------------------------------------------------------------------------------------------- compute-sanitizer


def sanitize(tool: str, seconds: float, *, dry: bool = False) -> dict[str, Any]:
    """Run "memcheck" or "racecheck" and return status, counts and complaints: see judge."""
    if dry:
        return {"status": NOT_MEASURED, "reason": f"a dry run has no GPU for {SANITIZER}"}
    program, missing = find_sanitizer()
    if program is None:
        return {"status": NOT_MEASURED, "reason": missing, "unproven": True}
    # One allocation per tensor, else an access beyond one tensor ends in another.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": str(ROOT)}
    output, code = run_for(sanitizer_command(program, tool), environment, seconds)
    return judge(tool, output, code, seconds)


def find_sanitizer(environment: Mapping[str, str] = os.environ) -> tuple[str | None, str]:
    """Return (the program, "") or (None, where it was looked for)."""
    toolkit = Path(environment.get("CUDA_HOME") or environment.get("CUDA_PATH") or "/usr/local/cuda")
    if path := shutil.which(SANITIZER, path=environment.get("PATH", "")):
        return path, ""
    spec = importlib.util.find_spec("nvidia")  # the namespace package of PyPI's CUDA packages
    packages = [Path(folder) for folder in (spec.submodule_search_locations or [])] if spec else []
    candidates = [toolkit / "bin" / SANITIZER, toolkit / SANITIZER / SANITIZER]
    candidates += [path for folder in packages for path in sorted(folder.glob(f"*/{SANITIZER}/{SANITIZER}"))]
    if found := next((path for path in candidates if os.access(path, os.X_OK)), None):
        return str(found), ""
    return None, (
        f"not found: {SANITIZER} is neither in PATH nor in {toolkit}, nor a package: "
        "pip install nvidia-cuda-sanitizer-api. Nobody looked for accesses out of bounds and races on this GPU"
    )


def sanitizer_command(program: str, tool: str) -> list[str]:
    """Return the command line."""
    options = ["--tool", tool, "--kernel-name", _OURS, "--print-limit", "20", "--error-exitcode", "9"]
    if tool == "memcheck":
        options += ["--padding", "512"]  # so that an overrun of one tensor hits no other
        options += ["--report-api-errors", "no"]  # torch tries calls that a driver may lack; real failures raise
    return [program, *options, sys.executable, "-m", "benchmarks.gpu.layouts"]


def judge(tool: str, output: str, code: int | None, seconds: float) -> dict[str, Any]:
    """Return the record of a run; ``code`` is None if it ran out of time.

    There are two verdicts. "failed" counts wrong results of the program, which make the case FAILED. "reports" counts
    the tool's complaints, which alone make it REPORTED.
    """
    reports = [line.lstrip("= ").rstrip() for line in output.splitlines() if line.startswith("=========")]
    verdict, checked = _VERDICT[tool].search(output), _CHECKED.search(output)
    found = _FOUND.search(output) or (checked and int(checked[2]))
    if _UNABLE.search(output) or not (found or (verdict and checked)):
        said = [line.lstrip("= ") for line in output.splitlines() if line.strip("= ")] or ["it said nothing"]
        last = next((line for line in said if _UNABLE.search(line)), said[-1])
        why = f"exit code {code}: {last}"
        if code is None:
            why = f"stopped after {seconds:.0f} s, nothing found until then"
        return {"status": NOT_MEASURED, "reason": f"{SANITIZER} gave no verdict: {why}"[:300], "unproven": True}
    errors = int(verdict["errors"]) if verdict else len(_FOUND.findall(output))
    warnings = int(verdict.groupdict().get("warnings") or 0) if verdict else 0
    complaints = [line for line in output.splitlines() if line.startswith("wrong: ")]
    complaints += [line for line in reports if line][:20] if errors or warnings else []
    if not checked:
        complaints.insert(0, f"its program did not end: {'out of time' if code is None else f'exit code {code}'}")
    failed, complete = int(checked[2]) if checked else 0, bool(verdict and checked)
    return {
        "status": FAILED if failed else REPORTED if errors or not complete else MEASURED,
        "passed": int(checked[1]) if checked else 0,
        "failed": failed,
        "skipped": 0,
        "reports": errors,
        "warnings": warnings,
        "complaints": complaints,
        "complete": complete,
    }
