"""pytest --seconds N: skip each test that would begin more than N seconds after the start, and report their number.

The order of the files changes with the commit, so that every file has its turn over several commits.
"""

import hashlib
import subprocess
import time
from pathlib import Path

import pytest

REASON = "the time is up (--seconds)"
_BEGAN = time.monotonic()


def pytest_addoption(parser):
    parser.addoption("--seconds", type=float, help="skip tests that would begin later than this after the start")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--seconds") is not None:
        commit = _commit()
        items.sort(key=lambda item: hashlib.sha256(f"{commit} {item.path.name}".encode()).digest())


def pytest_runtest_setup(item):
    most = item.config.getoption("--seconds")
    if most is not None and time.monotonic() - _BEGAN > most:
        pytest.skip(REASON)


def pytest_terminal_summary(terminalreporter, config):
    if config.getoption("--seconds") is not None:
        left = sum(REASON in str(report.longrepr) for report in terminalreporter.stats.get("skipped", []))
        terminalreporter.write_line(f"left out, because the time was up: {left} tests")


def _commit() -> str:
    run = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
    return run.stdout
