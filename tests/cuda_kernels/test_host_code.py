"""C++ without emulated threads, compiled and run: masks, factors of d_scores, refusals, the numbers of the emulator."""

import subprocess
from pathlib import Path

import emulated
import pytest

from building.compile import CannotBuild, system_headers
from building.nvcc import find_nvcc
from mft_kernels.triton.cost import Jobs, busy_cycles


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


def test_factors_of_d_scores_are_the_reference_s(tmp_path):
    run("test_score_factor.cpp", tmp_path)


def test_the_hopper_kernel_of_d_scores_names_what_it_leaves_to_others(tmp_path):
    run("test_refusal.cpp", tmp_path, str(emulated.ROOT / "csrc/cuda/score_grad_sm90.cpp"))


def cycles_by_the_model(multiprocessors, m, p, q, words, transposed, tokens):
    """Of product_sm90: clusters of two blocks, 256 features, 64 of Q a step; see product_sm90.cuh."""
    mask = (64 if transposed else 128) * 16 if words else 128 * 64 * 2
    weight, tile = 128 * 64 * 2 + mask, tokens * 64 * 2
    jobs = Jobs(
        count=-(-p // 256) * -(-m // tokens),
        steps=2 * -(-q // 128),
        multiply_adds=128 * tokens * 64,
        read=weight + tile // 2,
        written=2 * 128 * tokens,
    )
    stages = min(8, (227 * 1024 - 2 * 3 * 32 * 128 - 1024) // (weight + tile))
    return busy_cycles([jobs], max(1, multiprocessors // 2), blocks=1, stages=stages, rate=2048)


def test_the_hopper_product_chooses_its_tile_by_the_model_of_triton_s(tmp_path):
    lines = run("test_tile_cost.cpp", tmp_path, str(emulated.HERE / "emulator/machine.cpp")).splitlines()
    assert len(lines) == 5 * 6 * 13 * 3
    chosen = {}
    for *case, tokens, of_64, of_128, of_256 in map(str.split, lines):
        case = tuple(map(int, case))
        expected = {size: cycles_by_the_model(*case, size) for size in (64, 128, 256)}
        assert (float(of_64), float(of_128), float(of_256)) == tuple(expected.values()), case
        chosen[case] = int(tokens)
        assert chosen[case] == min((s for s in expected if s == 64 or case[1] > s // 2), key=expected.get), case
    assert [chosen[132, m, 4096, 4096, 0, 0] for m in (1, 64, 128, 512, 1024, 4096)] == [64, 64, 64, 128, 256, 256]


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
