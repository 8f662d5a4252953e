"""Whatever a disk does to a run, and wherever a run is killed, it reaches the same end. The short form."""

import os
import subprocess
import sys
from pathlib import Path

import file_faults
import pytest

CASES = int(os.environ.get("MFT_FILE_FAULTS", "8"))  # of about two thousand, spread over all places


@pytest.mark.slow
def test_a_run_that_met_a_fault_goes_on_to_the_same_bytes():
    """MFT_FILE_FAULTS=200 tries more; python tests/files/file_faults.py (make faults) tries every fault everywhere."""
    command = [sys.executable, str(Path(file_faults.__file__)), "--cases", str(CASES), "--jobs", "1"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60 + 20 * CASES)
    if result.returncode == file_faults.NO_COMPILER:
        pytest.skip(result.stdout.strip())
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.splitlines()[-1].startswith(f"{CASES} faults: ")
