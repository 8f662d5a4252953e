"""Tests specific to the triton backend's kept_threshold: digits, programs, and tests that need a GPU.

tests/ops/test_select.py tests the results, which are the same for every backend.
"""

from dataclasses import replace

import pytest
import torch

from mft_kernels import reference
from mft_kernels.backends.triton import select
from mft_kernels.backends.triton.target import H100, H100_OLD_TRITON, MI300X, interpreting

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MODES = ("magnitude", "value")
BLOCK = select._BLOCK


def normal(*shape, seed=0):
    return 0.02 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("digits", [select._WIDE, select._NARROW], ids=["wide", "narrow"])
@pytest.mark.parametrize("multiprocessors", [1, 5])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_digits_and_the_number_of_programs_change_no_bit(device, dtype, mode, multiprocessors, digits):
    scores = normal(6 * BLOCK + 77, seed=1).to(device, dtype)
    kept = reference.kept_count(scores.numel(), 0.9)
    got = select._kth_largest(
        scores, kept, mode, digits=digits[scores.element_size(), mode], multiprocessors=multiprocessors
    )
    assert torch.equal(got.cpu(), reference.kept_threshold(scores.cpu(), 0.9, mode))


@pytest.mark.parametrize("table", [select._WIDE, select._NARROW], ids=["wide", "narrow"])
def test_digits_add_up_to_the_key_and_the_first_holds_sign_and_exponent(table):
    for dtype, exponent in ((torch.float32, 8), (torch.bfloat16, 8), (torch.float16, 5)):
        for mode in MODES:
            digits = table[dtype.itemsize, mode]
            sign = 1 if mode == "value" else 0
            assert sum(digits) == 8 * dtype.itemsize - 1 + sign
            assert digits[0] >= sign + exponent


def test_triton_3_6_and_hip_count_fewer_bins_at_once():
    assert select._digits(H100) is select._WIDE
    assert select._digits(replace(H100, compiler=(3, 10))) is select._WIDE
    assert select._digits(H100_OLD_TRITON) is select._NARROW
    assert select._digits(MI300X) is select._NARROW


def test_scores_that_require_grad_are_taken(device):
    scores = normal(5, 7).to(device).requires_grad_()
    assert not select.select(scores, 0.5, "magnitude").requires_grad


@pytest.mark.skipif(interpreting(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("mode", MODES)
def test_it_runs_in_a_cuda_graph_and_never_waits_for_the_device(device, mode):
    scores = normal(300, 1000).to(device)
    select.select(scores, 0.9, mode)  # compiles first
    graph = torch.cuda.CUDAGraph()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.graph(graph):
            threshold = select.select(scores, 0.9, mode)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for seed in (1, 2):
        scores.copy_(normal(300, 1000, seed=seed))
        graph.replay()
        assert torch.equal(threshold.cpu(), reference.kept_threshold(scores.cpu(), 0.9, mode))


@pytest.mark.skipif(interpreting(), reason="2^31 scores are too many for the interpreter")
@pytest.mark.parametrize("mode", MODES)
def test_more_than_2_to_the_31_scores_are_counted(device, mode):
    numel = 2**31 + 4097
    scores = torch.zeros(numel, dtype=torch.bfloat16, device=device)
    scores[-3:] = torch.tensor([1.0, 2.0, 3.0])
    scores[:2] = torch.tensor([4.0, 2.5])
    arguments = {"digits": select._WIDE[2, mode], "multiprocessors": 100}
    for kept, expected in ((1, 4.0), (2, 3.0), (3, 2.5), (4, 2.0), (5, 1.0), (6, 0.0), (numel, 0.0)):
        assert select._kth_largest(scores, kept, mode, **arguments) == expected
