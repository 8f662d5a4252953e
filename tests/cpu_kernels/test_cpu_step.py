"""Tests specific to the cpu backend's score_step: chunks on threads, and bins of keys near the last threshold.

tests/ops/test_step.py tests the results, which are the same for every backend.
"""

import pytest
import torch
from by_name import ByName
from products import MODES
from score_steps import arguments, assert_steps_equal_the_reference

from mft_kernels.backends import cpu

flat = ByName(cpu)


FORMATS = (torch.float32, torch.bfloat16, torch.int16)


@pytest.mark.parametrize(("dtype", "eight_bit"), zip(FORMATS, (False, True, True)), ids=str)
def test_chunks_on_several_threads_meet_without_a_seam(dtype, eight_bit, threads):
    """Three chunks of 2^18, the last one cut within a block."""
    threads(2)
    assert_steps_equal_the_reference(flat.score_step, arguments((601, 901), dtype, eight_bit))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("lower", [0, 0x7FFF])
def test_the_first_and_the_last_value_of_a_bin_are_found_near_the_hint(mode, lower):
    tensors = arguments((20, 40), torch.float32, False)
    tensors["scores"].view(torch.int32).fill_(0x3C238000 + lower)  # about 0.01; few enough that all are candidates
    hint = tensors["scores"][0, 0].clone()
    options = {"lr": 0.0, "keep_ratio": 0.9, "mode": mode, "threshold": hint}
    _, (threshold, _) = assert_steps_equal_the_reference(flat.score_step, tensors, steps=1, **options)
    assert torch.equal(threshold, hint)
