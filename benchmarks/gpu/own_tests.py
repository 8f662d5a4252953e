"""tests/triton_kernels on this device, in a process of its own; and any other command that may run out of time."""

import importlib.util
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..harness import ROOT
from .journal import FAILED, MEASURED, NOT_MEASURED

TESTS = "tests/triton_kernels"

_OUTCOME = re.compile(r"\b(PASSED|FAILED|SKIPPED|ERROR|XFAIL|XPASS)\b")


def run_tests(seconds: float, *, dry: bool = False, path: str = TESTS) -> tuple[str, dict[str, Any]]:
    """pytest on ``path``, counted line by line, so that what was cut off still counts as far as it came."""
    if not list(Path(ROOT, path).rglob("test_*.py")):
        return NOT_MEASURED, {"reason": f"no tests in {path}"}
    if dry:
        return NOT_MEASURED, {"reason": f"a dry run leaves {path} to make test"}
    command = [sys.executable, "-m", "pytest", path, "-v", "--tb=short", "-p", "no:cacheprovider"]
    # What the project's own options need may be missing here, and what else is installed may warn.
    command += ["-o", "addopts=--strict-markers"]
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    if importlib.util.find_spec("xdist"):  # most of the time goes into compiling
        command += ["-p", "xdist.plugin", "-n", str(max(1, min(8, (os.cpu_count() or 1) // 2)))]
    environment.pop("TRITON_INTERPRET", None)
    environment.pop("MFT_KERNELS", None)
    output, code = run_for(command, environment, seconds)
    return summarise(output, code, seconds)


def summarise(output: str, code: int | None, seconds: float) -> tuple[str, dict[str, Any]]:
    """(status, counts and complaints) of pytest -v; ``code`` is None if it ran out of time."""
    lines = output.splitlines()
    outcomes = [(found.group(1), line) for line in lines if "::" in line and (found := _OUTCOME.search(line))]
    # The short summary at the end names failures a second time.
    outcomes = [(what, line) for what, line in outcomes if not line.startswith(("FAILED ", "ERROR ", "SKIPPED "))]
    counts = Counter(what for what, _ in outcomes)
    bad = [" ".join(line.split()) for what, line in outcomes if what in ("FAILED", "ERROR", "XPASS")]
    details = [line for line in lines if line.startswith(("FAILED ", "ERROR ", "E  "))][:40]
    fields: dict[str, Any] = {
        "passed": counts["PASSED"],
        "failed": len(bad),
        "skipped": counts["SKIPPED"] + counts["XFAIL"],
        "complaints": [*bad[:40], *details],
        "complete": code in (0, 1),
    }
    if code is None:
        fields["complaints"].insert(0, f"stopped after {seconds:.0f} s")
    elif code not in (0, 1):
        fields["complaints"].insert(0, f"pytest exited with {code}: {' '.join(lines[-3:])[:300]}")
    return (MEASURED if code == 0 and fields["passed"] and not bad else FAILED), fields


def run_for(command: Sequence[str], environment: Mapping[str, str], seconds: float) -> tuple[str, int | None]:
    """(output, exit code or None if stopped); its children end with it."""
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, process_group=0
    )
    try:
        return process.communicate(timeout=seconds)[0], process.returncode
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return process.communicate()[0], None
