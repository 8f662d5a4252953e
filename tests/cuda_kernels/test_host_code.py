"""C++ without emulated threads, compiled and run: masks, factors of d_scores, refusals, the numbers of the emulator."""

import shutil
import subprocess
from pathlib import Path

import emulated
import pytest


def run(source: str, directory: Path, *flags: str) -> None:
    """Compiles and runs one of the files beside this one, which says what went wrong."""
    program = directory / "program"
    command = [emulated.compiler(), *emulated.FLAGS, *flags, str(emulated.TESTS / source), "-o", str(program)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    result = subprocess.run([str(program)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def cuda_headers() -> Path:
    """The include directory of an nvcc; skips where there is none."""
    nvcc = shutil.which("nvcc")
    if nvcc is not None:
        # nvcc may be a script that calls another: its own word is what counts.
        said = subprocess.run([nvcc, "-E", "-x", "cu", "-M", "/dev/null"], capture_output=True, text=True).stdout
        for part in said.split():
            if part.endswith("/cuda_runtime.h") and Path(part).with_name("cuda_fp16.h").exists():
                return Path(part).parent
    pytest.skip("CUDA's headers are compared with, and no nvcc that has them is in PATH")


def test_every_score_is_kept_as_floats_compare(tmp_path):
    run("test_keep.cpp", tmp_path)


def test_the_emulator_converts_numbers_as_cuda_does(tmp_path):
    run("test_numbers.cpp", tmp_path, f"-isystem{cuda_headers()}")


def test_factors_of_d_scores_are_the_reference_s(tmp_path):
    run("test_score_factor.cpp", tmp_path)


def test_the_hopper_kernel_of_d_scores_names_what_it_leaves_to_others(tmp_path):
    run("test_refusal.cpp", tmp_path, str(emulated.ROOT / "csrc/cuda/score_grad_sm90.cpp"))
