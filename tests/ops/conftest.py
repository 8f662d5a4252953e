"""``kernels``: one behaviour, tested on every backend's kernels as they run on this machine.

A test of an op compares the results of ``kernels`` with the reference. cpu_kernels, triton_kernels and cuda_kernels
test what only one backend has: tiles, instructions, schedules, the choice of a plan.
"""

import zlib
from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
from by_name import ByName, backend
from forms import DTYPES, INSTRUCTION_SETS, OTHERS, Emulated, Kernels, OnCard, OnInstructionSet
from products import CARDS

from mft_kernels.backends import cpu
from mft_kernels.backends.table import registered


@pytest.fixture(params=[*INSTRUCTION_SETS, "triton", "cuda", *OTHERS])
def kernels(request):
    """Yield the kernels of each backend and CPU instruction set; skip with the reason if they cannot run.

    A test that needs others names them: @pytest.mark.parametrize("kernels", ["cpu-avx2", "cuda"], indirect=True).
    """
    name, _, form = request.param.partition("-")
    if request.param in OTHERS:
        dtypes = registered(request.param).dtypes
        yield Kernels(
            request.param, backend(request.param), dtypes=tuple(d for d in DTYPES if not dtypes or d in dtypes)
        )
    elif name == "cpu":
        yield _on_instruction_set(form, request)
    elif name == "cuda":
        yield _in_emulator(form, request)
    else:
        yield from _on_triton(form, request)


def _on_instruction_set(capability: str, request: pytest.FixtureRequest) -> Kernels:
    if cpu.unavailable is not None:
        pytest.skip(f"cpu backend: {cpu.unavailable}")
    if capability not in cpu.capabilities():
        pytest.skip(f"{capability} is not among {cpu.capabilities()} of this machine and build")
    request.getfixturevalue("monkeypatch").setenv("MFT_CPU_CAPABILITY", capability)
    assert torch.ops.mft_cpu.capability() == capability
    return OnInstructionSet("cpu", ByName(cpu), take_path=request.getfixturevalue("take_path"))


def _on_triton(card: str, request: pytest.FixtureRequest) -> Iterator[Kernels]:
    """In the interpreter or on a GPU, products take the form of a card; memory that the ops allocate begins as NaN."""
    device = request.getfixturevalue("triton_device")
    request.getfixturevalue("poisoned_outputs")
    from mft_kernels.backends import triton
    from mft_kernels.backends.triton import target

    by_name, _ = triton.functions()
    if card == "a_card":
        card = CARDS[zlib.crc32(request.node.name.encode()) % len(CARDS)]
    with target.assume(getattr(target, card, target.target_of(device))) if card else nullcontext():
        yield OnCard("triton", ByName(by_name), device)


def _in_emulator(arch: str, request: pytest.FixtureRequest) -> Kernels:
    emulated = request.getfixturevalue("emulator")
    kernels = Emulated("cuda", emulated, dtypes=(torch.bfloat16, torch.float16), any_strides=False, emulated=emulated)
    return kernels.of_hopper() if arch else kernels
