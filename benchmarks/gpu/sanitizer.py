"""compute-sanitizer over csrc/cuda: memcheck and racecheck of layouts.few, in a process of its own.

Where the tool is missing, or cannot serve the GPU, or has no time to end, nothing is proven: the record says
"unproven", and the suite's exit code says so too.
"""

import importlib.util
import os
import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..harness import ROOT
from .journal import FAILED, MEASURED, NOT_MEASURED
from .own_tests import run_for

NAME = "compute-sanitizer"
#: Only kernels in namespace mft::cuda are looked into; torch's own would take most of the time.
_OURS = "kns=3mft4cuda"
_ERRORS = 9  # the tool's exit code
_MOST_SECONDS = 100.0

#: What the tool says at its end: how many errors, and for racecheck how many warnings.
_VERDICT = {
    "memcheck": re.compile(r"ERROR SUMMARY: (?P<errors>\d+) error"),
    "racecheck": re.compile(r"RACECHECK SUMMARY: \d+ hazards? displayed \((?P<errors>\d+) errors?, (?P<warnings>\d+)"),
}
_FOUND = re.compile(r"^=+ (Invalid|Error|Warning|Illegal|Misaligned|Barrier|Program hit)", re.MULTILINE)
#: Of the tool itself, which then has seen nothing.
_UNABLE = re.compile(r"Device not supported|Internal Sanitizer Error|terminated before first instrumented API call")
_CHECKED = re.compile(r"^sanitized: (\d+) passed, (\d+) failed$", re.MULTILINE)


def find(environment: Mapping[str, str] = os.environ) -> tuple[str | None, str]:
    """(the program, "") or (None, where it was looked for)."""
    toolkit = Path(environment.get("CUDA_HOME") or environment.get("CUDA_PATH") or "/usr/local/cuda")
    if path := shutil.which(NAME, path=environment.get("PATH", "")):
        return path, ""
    spec = importlib.util.find_spec("nvidia")  # what PyPI's packages of CUDA share
    packages = [Path(folder) for folder in (spec.submodule_search_locations or [])] if spec else []
    candidates = [toolkit / "bin" / NAME, toolkit / NAME / NAME]
    candidates += [path for folder in packages for path in sorted(folder.glob(f"*/{NAME}/{NAME}"))]
    for path in candidates:
        if os.access(path, os.X_OK):
            return str(path), ""
    return None, (
        f"not found: {NAME} is neither in PATH nor in {toolkit}, nor a package: pip install nvidia-cuda-sanitizer-api. "
        "Nobody looked for accesses out of bounds and races on this GPU"
    )


def run(tool: str, seconds: float, *, dry: bool = False) -> tuple[str, dict[str, Any]]:
    """(status, counts and complaints) of "memcheck" or "racecheck"; failed counts what the tool reports."""
    if dry:
        return NOT_MEASURED, {"reason": f"a dry run has no GPU for {NAME}"}
    program, missing = find()
    if program is None:
        return NOT_MEASURED, {"reason": missing, "unproven": True}
    seconds = min(seconds, _MOST_SECONDS)
    output, code = run_for(command(program, tool), environment(), seconds)
    return judge(tool, output, code, seconds)


def command(program: str, tool: str) -> list[str]:
    """What is run."""
    padding = ["--padding", "512"] if tool == "memcheck" else []  # so that what overruns one tensor hits no other
    # torch tries calls that a driver may not have; what fails of ours raises.
    api = ["--report-api-errors", "no"] if tool == "memcheck" else []
    options = ["--kernel-name", _OURS, "--print-limit", "20"]
    return [program, "--tool", tool, *options, *padding, *api, "--error-exitcode", str(_ERRORS),
            sys.executable, "-m", "benchmarks.gpu.sanitized"]  # fmt: skip


def environment() -> dict[str, str]:
    """Every tensor its own allocation, else an access beyond one ends in another."""
    return {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": str(ROOT)}


def judge(tool: str, output: str, code: int | None, seconds: float) -> tuple[str, dict[str, Any]]:
    """``code`` is None if it ran out of time."""
    reports = [line.lstrip("= ").rstrip() for line in output.splitlines() if line.startswith("=========")]
    verdict, checked = _VERDICT[tool].search(output), _CHECKED.search(output)
    found = _FOUND.search(output) or (checked and int(checked[2]))
    if _UNABLE.search(output) or not (found or (verdict and checked)):
        said = [line.lstrip("= ") for line in output.splitlines() if line.strip("= ")]
        last = next((line for line in said if _UNABLE.search(line)), said[-1] if said else "it said nothing")
        why = (
            f"stopped after {seconds:.0f} s, nothing found until then" if code is None else f"exit code {code}: {last}"
        )
        return NOT_MEASURED, {"reason": f"{NAME} gave no verdict: {why}"[:300], "unproven": True}
    errors = int(verdict["errors"]) if verdict else len(_FOUND.findall(output))
    wrong = int(checked[2]) if checked else 0
    warnings = int(verdict.groupdict().get("warnings") or 0) if verdict else 0
    complaints = [line for line in output.splitlines() if line.startswith("wrong: ")]
    complaints += [line for line in reports if line][:20] if errors or warnings else []
    if not checked:
        complaints.insert(0, f"its program did not end: {'out of time' if code is None else f'exit code {code}'}")
    fields = {"passed": int(checked[1]) if checked else 0, "failed": errors + wrong, "skipped": 0,
              "warnings": warnings, "complaints": complaints, "complete": bool(verdict and checked)}  # fmt: skip
    return (FAILED if fields["failed"] or not fields["complete"] else MEASURED), fields
