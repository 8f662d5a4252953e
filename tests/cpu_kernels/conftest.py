"""The instruction sets of the cpu backend; tests/ops tests what every backend's kernels must do."""

import pytest
import torch

from mft_kernels.backends import cpu


@pytest.fixture(autouse=True)
def needs_the_library():
    if cpu.unavailable is not None:
        pytest.skip(f"cpu backend: {cpu.unavailable}")


@pytest.fixture(params=["amx", "amx_emulated", "avx512_bf16", "avx512", "avx2", "portable"])
def capability(request, monkeypatch, needs_the_library):
    """Yield each instruction set; skip those that cannot run here."""
    if request.param not in cpu.capabilities():
        pytest.skip(f"{request.param} is not among {cpu.capabilities()} of this machine and build")
    monkeypatch.setenv("MFT_CPU_CAPABILITY", request.param)
    assert torch.ops.mft_cpu.capability() == request.param
    return request.param
