"""The CUDA kernels run on the host, in the emulator."""

import pytest


@pytest.fixture(autouse=True)
def every_test_runs_in_the_emulator(emulator):
    """Or skips where it cannot be built."""
