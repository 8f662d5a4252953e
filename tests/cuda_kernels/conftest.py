"""Run the CUDA kernels on the host, in the emulator."""

import pytest


@pytest.fixture(autouse=True)
def every_test_runs_in_the_emulator(emulator):
    """Skip the test if the emulator cannot be built."""
