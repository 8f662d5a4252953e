"""Tests specific to the CUDA kernels' kept_threshold: vectors, blocks, capabilities, warps.

tests/ops/test_select.py tests the results, which are the same for every backend.
"""

import emulated
import pytest
import torch
from in_turn import in_turn
from products import DTYPES, MODES

from mft_kernels import reference

VECTORS = 4096  # of 16 bytes, that a block reads at once
#: One capability whose blocks have shared memory for 32,768 counts, and one without.
CAPABILITIES = (80, 86)


def assert_same_threshold(scores, keep_ratio, mode, capabilities=CAPABILITIES, **device):
    """Assert the reference's result: equal in dtype, shape and value (NaN equals NaN)."""
    expected = reference.kept_threshold(scores, keep_ratio, mode)
    for capability in capabilities:
        got = emulated.kept_threshold(scores, keep_ratio, mode, capability=capability, **device)
        assert got.dtype == expected.dtype
        assert got.shape == ()
        assert torch.equal(got, expected) or (got.isnan() and expected.isnan()), (got, expected, capability)


def normal(*shape, seed=0):
    return 0.02 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def ratio(kept, numel):
    """Return a keep ratio that keeps exactly ``kept``, whatever the rounding of a quotient."""
    return max(kept - 0.5, 0) / numel


@pytest.mark.parametrize("capability", [75, 80, 86, 87, 89, 90, 100, 103, 110, 120, 121])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_capability_finds_it(dtype, capability):
    for mode in MODES:
        scores = normal(3001).to(dtype)
        for keep_ratio in (0, 0.75):
            assert_same_threshold(scores, keep_ratio, mode, (capability,))
        scores[2999] = -torch.inf
        assert_same_threshold(scores, 0.75, mode, (capability,))


@pytest.mark.parametrize(
    ("mode", "dtype", "vectors", "more"), in_turn(MODES, DTYPES, [1, VECTORS, 3 * VECTORS], [-1, 0, 1, 7])
)
def test_blocks_meet_without_a_seam(mode, dtype, vectors, more):
    numel = vectors * 16 // dtype.itemsize + more
    # The smallest and the largest score are at the ends of the memory, and no other score is close to them.
    scores = torch.linspace(-0.5, 0.5, numel).to(dtype)
    scores[0], scores[-1] = -3, 5
    for kept in {1, 2, numel - 1, numel}:
        assert_same_threshold(scores, ratio(kept, numel), mode, CAPABILITIES[:1] if kept > 1 else CAPABILITIES)


@pytest.mark.parametrize(("mode", "dtype", "multiprocessors"), in_turn(MODES, DTYPES, range(1, 9)))
def test_the_number_of_blocks_changes_no_bit(mode, dtype, multiprocessors):
    scores = normal(7 * VECTORS * 16 // dtype.itemsize + 77, seed=1).to(dtype)
    emulated.set_settings(seed=multiprocessors)
    assert_same_threshold(scores, 0.9, mode, (90,), multiprocessors=multiprocessors)


@pytest.mark.parametrize(("mode", "dtype", "value"), in_turn(MODES, DTYPES, [0.25, -0.25, -0.0]))
def test_more_equal_scores_than_16_bits_count_are_their_own_threshold(mode, dtype, value):
    numel = 3 * 65536 + 3
    scores = torch.full((numel,), value, dtype=dtype)
    for kept in (1, numel):
        assert_same_threshold(scores, ratio(kept, numel), mode, multiprocessors=1)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scores_may_begin_and_end_within_a_vector(dtype, mode):
    memory = normal(3000, seed=2).to(dtype)
    memory[:9], memory[2990:] = 100, 100  # these would change the result
    for begin in range(9, 18):
        for numel in (1, 5, 1234):
            scores = memory[begin : begin + numel]
            assert_same_threshold(scores, 0.6, mode, CAPABILITIES[:1])
            assert_same_threshold(scores, ratio(1, numel), mode, CAPABILITIES[1:])


def test_what_cannot_be_counted_is_refused():
    asked = emulated.Select(type=1, count=2**32, k=1)
    with pytest.raises(RuntimeError, match=r"fewer than 2\^32, got 4294967296; use the triton backend"):
        emulated._call("kept_threshold", asked, {})
    asked = emulated.Select(type=1, count=5, k=6)
    with pytest.raises(RuntimeError, match="k must lie between 0 and the 5 scores, got 6"):
        emulated._call("kept_threshold", asked, {})
