"""Tests specific to the CUDA kernels' pack_mask and pack_signs: groups of words, blocks, warps, addresses.

tests/ops/test_pack.py tests the results, which are the same for every backend.
"""

import emulated
import pytest
import torch

from mft_kernels import reference
from mft_kernels.testing import integer_inputs


def assert_matches_reference(scores, threshold, mode, **device):
    """Assert that mask and signs equal the reference's."""
    got = emulated.pack_mask(scores, threshold, mode, **device), *emulated.pack_signs(scores, **device)
    expected = reference.pack_mask(scores, threshold, mode), *reference.pack_signs(scores)
    for one, other in zip(got, expected):
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        assert torch.equal(one, other), (one, other)


def integer_scores(rows, columns, dtype):
    return integer_inputs(1, rows, columns, scores_dtype=dtype).scores


@pytest.mark.parametrize("multiprocessors", [1, 3])
def test_long_rows_are_taken_in_groups_of_words(multiprocessors):
    for columns in (1023, 1024, 1025, 1056, 2048, 3333):
        scores = integer_scores(70, columns, torch.bfloat16)
        threshold = torch.tensor(1.0).bfloat16()
        assert_matches_reference(scores, threshold, "magnitude", multiprocessors=multiprocessors)
