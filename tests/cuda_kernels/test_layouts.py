"""Where elements lie, which warp waits for which, and CUTLASS's kernel: the device's code, compared with CuTe.

CuTe and CUTLASS run on the host. They need their headers and CUDA's, but no nvcc.
"""

import pytest
from host_program import built, cuda_headers, run

from building.compile import system_headers
from building.nvcc import find_cutlass


def cute_headers() -> list[str]:
    """Return flags for CUTLASS's and CUDA's headers; skip if one is missing."""
    cutlass = find_cutlass()
    if cutlass is None:
        pytest.skip("CuTe is compared with: set CUTLASS_PATH, or pip install nvidia-cutlass")
    return [*system_headers([cutlass[1]]), *cuda_headers()]


def test_the_emulator_executes_what_cute_describes():
    run("test_layouts.cpp", [built("machine.cpp")], cute_headers())


def test_the_device_addresses_shared_memory_and_tma_as_cute_does():
    run("test_layouts_device.cpp", [built("machine.cpp")], cute_headers())


@pytest.mark.slow
def test_cutlass_s_kernel_of_d_scores_on_hopper_makes_every_element_bit_for_bit():
    # -O1, because -O0 runs too long. g++ parses all of CUTLASS's device code and does not know all functions that it
    # calls.
    flags = [*cute_headers(), "-O1", "-g0", "-fpermissive", "-w"]
    run("test_score_grad_sm90.cpp", [built("machine.cpp")], flags)


def test_no_schedule_of_the_load_warp_and_the_epilogue_of_d_scores_on_hopper_hangs():
    run("test_score_protocol.cpp", [], [*cute_headers(), "-fpermissive", "-w"])
