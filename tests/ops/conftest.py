"""``kernels``: one behaviour, tested on every backend's kernels as they run on this machine.

A test of an op compares what ``kernels`` gives with the reference. What only one backend can have (its tiles,
instructions, schedules, the choice of a plan) is tested in cpu_kernels, triton_kernels and cuda_kernels.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mft_kernels.backends import cpu
from mft_kernels.by_name import ByName, backend

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CPU = torch.device("cpu")
INSTRUCTION_SETS = ("cpu-amx", "cpu-amx_emulated", "cpu-avx512_bf16", "cpu-avx512", "cpu-avx2", "cpu-portable")


@dataclass(frozen=True)
class Kernels:
    """The ops of one backend by name, unchecked, in the arguments of the reference: kernels.masked_linear(x, ...)."""

    name: str  # "cpu", "triton", "cuda", or a backend of MFT_TEST_BACKENDS
    ops: Any
    device: torch.device = CPU
    dtypes: tuple[torch.dtype, ...] = DTYPES  # which it takes for activations and weight
    interpreted: bool = False  # a launch takes up to a tenth of a second

    def __getattr__(self, op: str) -> Callable:
        if not hasattr(self.ops, op) and hasattr(ByName, op):
            pytest.skip(f"{self.name} has no {op}")
        return getattr(self.ops, op)

    def need(self, *dtypes: torch.dtype) -> None:
        """Skip the test if the backend refuses activations and weights of one of them."""
        if refused := set(dtypes).difference(self.dtypes):
            pytest.skip(f"{self.name} takes no {', '.join(map(str, refused))}")

    def fewer(self, cases: Sequence, every: int) -> Sequence:
        """The cases; where each would take long, the first and every so many after it."""
        return cases[::every] if self.interpreted else cases


@pytest.fixture(params=[*INSTRUCTION_SETS, "triton", "cuda", *os.environ.get("MFT_TEST_BACKENDS", "").split()])
def kernels(request):
    """The kernels of each backend and CPU instruction set; skips with the reason where they cannot run.

    A test that takes other ones names them: @pytest.mark.parametrize("kernels", ["cpu-avx2", "cuda"], indirect=True).
    """
    name = request.param
    if name in INSTRUCTION_SETS:
        return _on_instruction_set(name.removeprefix("cpu-"), request.getfixturevalue("monkeypatch"))
    if name == "triton":
        return _on_triton(request)
    if name == "cuda":
        return _in_emulator(request.getfixturevalue("emulator"))
    return Kernels(name, backend(name))


def _on_instruction_set(capability: str, monkeypatch: pytest.MonkeyPatch) -> Kernels:
    if cpu.unavailable is not None:
        pytest.skip(f"cpu backend: {cpu.unavailable}")
    if capability not in cpu.capabilities():
        pytest.skip(f"{capability} is not among {cpu.capabilities()} of this machine and build")
    monkeypatch.setenv("MFT_CPU_CAPABILITY", capability)
    assert torch.ops.mft_cpu.capability() == capability
    return Kernels("cpu", ByName(cpu))


def _on_triton(request: pytest.FixtureRequest) -> Kernels:
    """In the interpreter or on a GPU; what the ops allocate begins as NaN."""
    device = request.getfixturevalue("triton_device")
    request.getfixturevalue("poisoned_outputs")
    from mft_kernels.backends import triton

    by_name, _ = triton.functions()
    return Kernels("triton", ByName(by_name), device, interpreted=device.type == "cpu")


def _in_emulator(emulated: Any) -> Kernels:
    from emulated import grouped

    ops = SimpleNamespace(**vars(emulated) | vars(grouped))
    return Kernels("cuda", ops, dtypes=(torch.bfloat16, torch.float16))
