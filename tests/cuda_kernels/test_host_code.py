"""C++ without emulated threads, compiled and run: masks, factors, scales, refusals, the emulator's number formats."""

import pytest
from host_program import built, run

from building.compile import CannotBuild, system_headers
from building.nvcc import find_nvcc


def cuda_headers() -> list[str]:
    """Return flags for CUDA's headers; skip if there are none."""
    try:
        return system_headers(find_nvcc().include)
    except CannotBuild as reason:
        pytest.skip(f"CUDA's headers are compared with: {reason}")


def test_every_score_is_kept_as_floats_compare():
    run("test_keep.cpp")


def test_the_emulator_converts_numbers_as_cuda_does():
    run("test_numbers.cpp", flags=cuda_headers())


def test_the_emulator_notices_a_write_into_what_is_being_read():
    run("test_reads.cpp", [built("machine.cpp")])


def test_a_cut_is_searched_for_once():
    run("test_decode_cut.cpp")


def test_factors_of_d_scores_are_the_reference_s():
    run("test_score_factor.cpp")


def test_the_hopper_kernel_of_d_scores_names_what_it_leaves_to_others():
    run("test_refusal.cpp", [built("score_grad_sm90.cpp")])


def test_as_many_stages_as_let_two_blocks_share_a_multiprocessor():
    lines = run("test_stages.cpp", [built("machine.cpp")]).splitlines()
    chosen = {tuple(map(int, line.split()[:2])): int(line.split()[2]) for line in lines}
    for (shared, stage_bytes), stages in chosen.items():
        together = 2 * (stages * stage_bytes + 1024) <= shared
        alone = stages * stage_bytes + 1024 <= shared and 2 * (2 * stage_bytes + 1024) > shared
        assert 2 <= stages <= 4
        assert together or alone, (shared, stage_bytes, stages)
    # 128 tokens: with packed masks, 16-bit scores and fp32 scores.
    assert [chosen[164 * 1024, size] for size in (16896, 24576, 32768)] == [4, 3, 2]
    assert [chosen[100 * 1024, size] for size in (16896, 24576, 32768)] == [2, 2, 3]
    assert [chosen[kib * 1024, 16384] for kib in (100, 164, 228)] == [3, 4, 4]  # d_scores: as many as its loops support
