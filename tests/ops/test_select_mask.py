"""select_mask is kept_threshold, pack_mask and pack_signs in one op, on every backend."""

import pytest
import torch
from products import MODES
from torch.library import opcheck

import mft_kernels
from mft_kernels import fixed_from_float, reference
from mft_kernels.ops.select import select_mask
from mft_kernels.reference.fixed_point import code_at_least, selectable

FORMATS = {"fp32": torch.Tensor.float, "bf16": torch.Tensor.bfloat16, "int16": fixed_from_float}


def some_scores(*shape):
    return 0.02 * torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def by_pieces(scores, threshold, mode):
    """Return the reference's mask and signs, and the number of zeros."""
    keys = selectable(scores)
    signs, zeros = reference.pack_signs(keys)
    return reference.pack_mask(keys, selectable(threshold), mode), signs, zeros


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("form", FORMATS)
def test_a_matrix_gets_the_results_of_the_three_ops(form, mode, backend):
    scores = FORMATS[form](some_scores(33, 70))
    scores[3, :5] = 0
    for keep_ratio in (0, 0.3, 0.8, 1):
        threshold = reference.kept_threshold(selectable(scores), keep_ratio, mode).view(scores.dtype)
        expected = (threshold, *by_pieces(scores, threshold, mode))
        found = select_mask(scores, keep_ratio, None, mode, backend=backend)
        for got, want in zip(found, expected, strict=True):
            assert torch.equal(got, want)
        assert found[3] >= 5
        assert torch.equal(mft_kernels.kept_threshold(scores, keep_ratio, mode=mode, backend=backend), threshold)
        assert torch.equal(mft_kernels.pack_mask(scores, threshold, mode=mode, backend=backend), expected[1])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("form", FORMATS)
def test_each_expert_gets_the_results_of_a_matrix(form, mode, backend):
    scores = FORMATS[form](some_scores(3, 9, 70))
    threshold, packed, signs, zeros = select_mask(scores, 0.8, None, mode, backend=backend)
    assert threshold.shape == (3,)
    for e, one in enumerate(scores):
        alone = select_mask(one, 0.8, None, mode, backend="reference")
        assert torch.equal(threshold[e], alone[0])
        assert torch.equal(packed[e], alone[1])
        assert torch.equal(signs[e], alone[2])
    assert zeros == selectable(scores).eq(0).sum()


@pytest.mark.parametrize("shape", [(9, 70), (2, 9, 70)], ids=str)
@pytest.mark.parametrize("form", FORMATS)
def test_a_fixed_threshold_is_taken_as_it_is(form, shape, backend):
    scores = FORMATS[form](some_scores(*shape))
    threshold, packed, *_ = select_mask(scores, 0.8, 0.01, "magnitude", backend=backend)
    expected = scores.new_full((), code_at_least(0.01) if form == "int16" else 0.01)
    assert torch.equal(threshold, expected)
    assert torch.equal(packed.flatten(0, -2), by_pieces(scores.flatten(0, -2), expected, "magnitude")[0])


def test_without_signs_none_are_packed(backend):
    scores = some_scores(9, 70)
    *mask, signs, zeros = select_mask(scores, 0.8, None, "magnitude", with_signs=False, backend=backend)
    for got, expected in zip(mask, select_mask(scores, 0.8, None, "magnitude", backend="reference")[:2]):
        assert torch.equal(got, expected)
    assert signs.numel() == zeros == 0


@pytest.mark.parametrize("form", ["fp32", "bf16"])
def test_a_matrix_with_a_score_that_is_not_finite_keeps_nothing(form, backend):
    scores = FORMATS[form](some_scores(2, 9, 70))
    scores[1, 2, 3] = torch.nan
    threshold, packed, *_ = select_mask(scores, 0.8, None, "magnitude", backend=backend)
    assert threshold.isnan().tolist() == [False, True]
    assert packed[0].any()
    assert not packed[1].any()
    assert not select_mask(scores[1], 0.8, None, "magnitude", backend=backend)[1].any()


@pytest.mark.parametrize("shape", [(5, 37), (2, 5, 37)], ids=str)
@pytest.mark.parametrize("form", ["fp32", "int16"])
def test_opcheck(form, shape, backend):
    op, scores = torch.ops.mft.select_mask.default, FORMATS[form](some_scores(*shape))
    opcheck(op, (scores, 0.9, None, "magnitude", form == "fp32", backend))
    opcheck(op, (scores, 0.9, 0.01, "value", False, backend))
