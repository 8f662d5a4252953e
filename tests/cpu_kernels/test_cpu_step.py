"""Tests specific to the cpu backend's score_step and threshold: spans on threads, and the window of keys they collect.

tests/ops/test_step.py tests the results, which are the same for every backend.
"""

import itertools

import pytest
import torch
from by_name import ByName, oracle
from products import MODES
from score_steps import arguments, assert_steps_equal_the_reference

from mft_kernels.backends import cpu

flat = ByName(cpu)


FORMATS = (torch.float32, torch.bfloat16, torch.int16)


@pytest.mark.parametrize(("dtype", "eight_bit"), zip(FORMATS, (False, True, True)), ids=str)
def test_chunks_on_several_threads_meet_without_a_seam(dtype, eight_bit, threads):
    """Several spans of 8192 a thread, the last one cut within a block."""
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


def _misleading(kind, size):
    """Return at least 2^20 scores. A sample of them says little about the rest."""
    place = torch.arange(size, dtype=torch.float32)
    match kind:
        case "rising":
            return place / size - 0.3
        case "one value":
            return torch.full((size,), -0.25)
        case "two values":
            return torch.where(place % 10 == 0, 0.125, -0.5)
        case "two far peaks":
            return torch.where(place < 0.9 * size, 1e-30 + place * 1e-38, 1e30)
        case "zeros":
            return torch.where(place % 97 == 0, -(place + 1) / size, -0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["rising", "one value", "two values", "two far peaks", "zeros"])
def test_the_threshold_is_exact_whatever_a_sample_says(capability, kind, dtype):
    scores = _misleading(kind, (1 << 20) + 7).clamp(-6e4, 6e4).to(dtype)
    for mode, keep_ratio in itertools.product(MODES, (0.1, 0.9, 0.9999999, 1)):
        got = flat.kept_threshold(scores, keep_ratio, mode)
        assert torch.equal(got, oracle.kept_threshold(scores, keep_ratio, mode)), (mode, keep_ratio)
    scores[1 << 19] = torch.nan
    assert flat.kept_threshold(scores, 0.5, "value").isnan()
