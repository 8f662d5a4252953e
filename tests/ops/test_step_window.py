"""The next threshold wherever it lies from the last one, near which Triton's steps look for it.

A step counts the 16-bit scores whose keys are near the old threshold's. Only if the next threshold is not among these
keys, a selection over all scores finds it.
"""

import pytest
import torch
from products import MODES
from score_steps import arguments, assert_steps_equal_the_reference, normal, scores_of

from mft_kernels import reference
from mft_kernels.reference.fixed_point import selectable

BY_DTYPE = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int16], ids=str)
BY_MODE = pytest.mark.parametrize("mode", MODES)

pytestmark = [
    pytest.mark.usefixtures("correctly_rounded_sqrt"),
    pytest.mark.parametrize("kernels", ["triton"], indirect=True),
]


def check(kernels, tensors, **options):
    assert_steps_equal_the_reference(kernels.score_step, tensors, steps=1, device=kernels.device, **options)


def still(shape, values):
    """Return the arguments of a step that moves no score; ``values``: the bits of the scores."""
    tensors = arguments(shape, values.dtype, True, weight_dtype=None)
    tensors["grad"].zero_()
    tensors["scores"].copy_(values)
    return tensors


@BY_MODE
@BY_DTYPE
def test_near_the_last_one_and_far_from_it(kernels, dtype, mode):
    tensors = arguments((40, 130), dtype, True)
    for keep_ratio in kernels.fewer((0.1, 0.9, 1), 2):
        before = reference.kept_threshold(selectable(tensors["scores"]), keep_ratio, mode).view(dtype)
        check(kernels, tensors, threshold=before, mode=mode, keep_ratio=keep_ratio, lr=1e-4)
    middle = -0.01 if mode == "value" else 0.01
    tensors["scores"] = scores_of(middle + 0.001 * normal(40, 130), dtype)
    for hint in scores_of(torch.tensor([1e-12, 0.5, torch.nan, torch.inf]), dtype):
        check(kernels, tensors, threshold=hint, mode=mode, keep_ratio=0.5)


@BY_MODE
@BY_DTYPE
def test_at_either_end_of_the_window_and_behind_it(kernels, dtype, mode):
    from mft_kernels.backends.triton.score_step import window_of
    from mft_kernels.backends.triton.target import target_of

    hint, half = scores_of(torch.tensor(0.02), dtype), window_of(target_of(kernels.device)) // 2
    for offset in (-half, -half - 1, half - 1, half):
        bits = torch.full((3, 700), int(hint.view(torch.int16)) + offset, dtype=torch.int16)
        check(kernels, still((3, 700), bits.view(dtype)), threshold=hint, mode=mode, keep_ratio=0.5)


@BY_MODE
@BY_DTYPE
def test_every_rank_is_found(kernels, dtype, mode):
    """Ties, neighbours, both ends of a warp's keys, and offsets on either side of the window."""
    hint = scores_of(torch.tensor(0.01), dtype)
    offsets = [-600, -512, -481, -480, -449, -1, 0, 0, 1, 31, 32, 33, 255, 479, 480, 511, 512, 600] * 4
    bits = (int(hint.view(torch.int16)) + torch.tensor([offsets[:61]])).to(torch.int16)
    for kept in kernels.fewer(range(1, 62), 20):
        check(kernels, still((1, 61), bits.view(dtype)), threshold=hint, mode=mode, keep_ratio=(kept - 0.5) / 61)


@pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")  # numpy's
@BY_DTYPE
def test_ratio_zero_and_a_score_that_is_not_finite(kernels, dtype):
    hint = scores_of(torch.tensor(0.002), dtype)
    tensors = arguments((5, 300), dtype, True, weight_dtype=None)
    check(kernels, tensors, threshold=hint, keep_ratio=0)
    for bad, mode in zip((torch.nan, torch.inf, -torch.inf), ("value", *MODES)):
        tensors["grad"][3, 7] = bad
        check(kernels, tensors, threshold=hint, mode=mode)
