"""C++ without emulated threads, compiled and run: masks, factors of d_scores, refusals, the numbers of the emulator."""

import subprocess
from pathlib import Path

import emulated
import pytest

from building.compile import CannotBuild, system_headers
from building.nvcc import find_nvcc


def run(source: str, directory: Path, *flags: str) -> None:
    """Compiles and runs one of the files beside this one, which says what went wrong."""
    program = directory / "program"
    command = [emulated.compiler(), *emulated.FLAGS, *flags, str(emulated.PROGRAMS / source), "-o", str(program)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    result = subprocess.run([str(program)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def cuda_headers() -> list[str]:
    """Flags for CUDA's headers; skips where there are none."""
    try:
        return system_headers(find_nvcc().include)
    except CannotBuild as reason:
        pytest.skip(f"CUDA's headers are compared with: {reason}")


def test_every_score_is_kept_as_floats_compare(tmp_path):
    run("test_keep.cpp", tmp_path)


def test_the_emulator_converts_numbers_as_cuda_does(tmp_path):
    run("test_numbers.cpp", tmp_path, *cuda_headers())


def test_factors_of_d_scores_are_the_reference_s(tmp_path):
    run("test_score_factor.cpp", tmp_path)


def test_the_hopper_kernel_of_d_scores_names_what_it_leaves_to_others(tmp_path):
    run("test_refusal.cpp", tmp_path, str(emulated.ROOT / "csrc/cuda/score_grad_sm90.cpp"))
