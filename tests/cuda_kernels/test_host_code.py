"""C++ without emulated threads, compiled and run: masks, factors, scales, refusals, the numbers of the emulator."""

import subprocess
from pathlib import Path

import emulated
import pytest

from building.compile import CannotBuild, system_headers
from building.nvcc import find_nvcc


def run(source: str, directory: Path, *flags: str) -> str:
    """Compiles and runs one of the files beside this one, which says what went wrong; what it printed."""
    program = directory / "program"
    command = [emulated.compiler(), *emulated.FLAGS, *flags, str(emulated.PROGRAMS / source), "-o", str(program)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    result = subprocess.run([str(program)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
    return result.stdout


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


def test_an_absmax_is_divided_by_127_without_a_division(tmp_path):
    run("test_over_127.cpp", tmp_path)


def test_factors_of_d_scores_are_the_reference_s(tmp_path):
    run("test_score_factor.cpp", tmp_path)


def test_the_hopper_kernel_of_d_scores_names_what_it_leaves_to_others(tmp_path):
    run("test_refusal.cpp", tmp_path, str(emulated.ROOT / "csrc/cuda/score_grad_sm90.cpp"))


def test_as_many_stages_as_let_two_blocks_share_a_multiprocessor(tmp_path):
    lines = run("test_stages.cpp", tmp_path, str(emulated.HERE / "emulator/machine.cpp")).splitlines()
    chosen = {tuple(map(int, line.split()[:2])): int(line.split()[2]) for line in lines}
    for (shared, stage_bytes), stages in chosen.items():
        together = 2 * (stages * stage_bytes + 1024) <= shared
        alone = stages * stage_bytes + 1024 <= shared and 2 * (2 * stage_bytes + 1024) > shared
        assert 2 <= stages <= 4
        assert together or alone, (shared, stage_bytes, stages)
    # 128 tokens: by words, 16-bit and fp32 scores.
    assert [chosen[164 * 1024, size] for size in (16896, 24576, 32768)] == [4, 3, 2]
    assert [chosen[100 * 1024, size] for size in (16896, 24576, 32768)] == [2, 2, 3]
    assert [chosen[kib * 1024, 16384] for kib in (100, 164, 228)] == [3, 4, 4]  # d_scores: all that it has loops for
