"""Run the CUDA kernels on the host, in the emulator."""

import emulated
import pytest


@pytest.fixture(autouse=True)
def every_test_runs_in_the_emulator(emulator):
    """Skip the test if the emulator cannot be built."""


@pytest.fixture
def ways(monkeypatch):
    """Return a list of (tokens of a tile, parts of the sum) for each product and d_scores that is computed."""
    seen, plan = [], emulated.plan

    def noted(kernel, asked, device):
        found = plan(kernel, asked, device)
        assert (found.workspace > 0) == (found.parts > 1)
        seen.append((found.tokens, found.parts))
        return found

    monkeypatch.setattr(emulated, "plan", noted)
    return seen


@pytest.fixture
def without_a_workspace(monkeypatch):
    """Let no launch ask for memory; then each sum is in one part."""
    monkeypatch.setattr(emulated, "plan", lambda *asked: emulated.Plan())
