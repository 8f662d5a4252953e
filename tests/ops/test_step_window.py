"""The window around the last threshold, in which Triton's steps look for the next one.

A step counts the 16-bit scores whose keys are near the old threshold's. Only if the next threshold is not among these
keys, a selection over all scores finds it.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from score_steps import arguments, assert_steps_equal_the_reference, normal, scores_of

from mft_kernels import reference
from mft_kernels.reference.fixed_point import selectable

MODES = ("magnitude", "value")
BY_DTYPE = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int16], ids=str)
BY_MODE = pytest.mark.parametrize("mode", MODES)

pytestmark = [
    pytest.mark.usefixtures("correctly_rounded_sqrt"),
    pytest.mark.parametrize("kernels", ["triton"], indirect=True),
]


@dataclass
class Window:
    """missed: for each step, whether its threshold was outside the window."""

    keys: int
    step: Callable
    device: torch.device
    missed: list[bool] = field(default_factory=list)

    def check(self, tensors, *, misses, **options):
        """Assert that a step equals the reference's, and reads all scores again if and only if the window misses."""
        assert_steps_equal_the_reference(self.step, tensors, steps=1, device=self.device, **options)
        assert self.missed[-1] == misses, options


@pytest.fixture
def window(kernels, monkeypatch):
    """Return Triton's window: the selection is launched with a flag on the device that says whether it missed."""
    from mft_kernels.backends.triton import score_step, select
    from mft_kernels.backends.triton.target import target_of

    found = Window(score_step.window_of(target_of(kernels.device)), kernels.score_step, kernels.device)

    def spy(*args, only_if, **kwargs):
        found.missed.append(bool(only_if.item()))
        return select.select(*args, only_if=only_if, **kwargs)

    monkeypatch.setattr(score_step, "select", spy)
    return found


@BY_MODE
@BY_DTYPE
def test_a_threshold_near_the_old_one_is_inside(window, kernels, dtype, mode):
    tensors = arguments((40, 130), dtype, True)
    for keep_ratio in kernels.fewer((0.1, 0.9, 1), 2):
        before = reference.kept_threshold(selectable(tensors["scores"]), keep_ratio, mode).view(dtype)
        window.check(tensors, misses=False, threshold=before, mode=mode, keep_ratio=keep_ratio, lr=1e-4)


@BY_MODE
@BY_DTYPE
def test_a_threshold_outside_is_found_by_the_full_selection(window, dtype, mode):
    tensors = arguments((40, 130), dtype, True)
    middle = -0.01 if mode == "value" else 0.01
    tensors["scores"] = scores_of(middle + 0.001 * normal(40, 130), dtype)
    for hint in scores_of(torch.tensor([1e-12, 0.5, torch.nan, torch.inf]), dtype):
        window.check(tensors, misses=True, threshold=hint, mode=mode, keep_ratio=0.5)


@BY_MODE
@BY_DTYPE
def test_it_ends_where_it_should(window, dtype, mode):
    hint = scores_of(torch.tensor(0.02), dtype)
    lowest, highest = -window.keys // 2, window.keys // 2 - 1
    for offset in (lowest, lowest - 1, highest, highest + 1):
        tensors = arguments((3, 700), dtype, True, weight_dtype=None)
        tensors["grad"].zero_()  # no score moves
        tensors["scores"].view(torch.int16).fill_(int(hint.view(torch.int16)) + offset)
        misses = not lowest <= offset <= highest
        window.check(tensors, misses=misses, threshold=hint, mode=mode, keep_ratio=0.5)


@BY_MODE
@BY_DTYPE
def test_every_rank_is_read_from_it(window, kernels, dtype, mode):
    tensors = arguments((1, 61), dtype, True, weight_dtype=None)
    tensors["grad"].zero_()
    hint = scores_of(torch.tensor(0.01), dtype)
    # Ties, neighbours, both ends of a warp's keys, and offsets on either side of the window.
    offsets = torch.tensor([-600, -512, -481, -480, -449, -1, 0, 0, 1, 31, 32, 33, 255, 479, 480, 511, 512, 600] * 4)[
        :61
    ]
    tensors["scores"].view(torch.int16)[0] = (int(hint.view(torch.int16)) + offsets).to(torch.int16)
    ranked = offsets.sort(descending=True).values.tolist()
    for kept in kernels.fewer(range(1, 62), 20):
        misses = not -window.keys // 2 <= ranked[kept - 1] < window.keys // 2
        window.check(tensors, misses=misses, threshold=hint, mode=mode, keep_ratio=(kept - 0.5) / 61)


@pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")  # numpy's
@BY_DTYPE
def test_neither_ratio_zero_nor_a_score_that_is_not_finite_needs_the_full_selection(window, dtype):
    hint = scores_of(torch.tensor(0.002), dtype)
    tensors = arguments((5, 300), dtype, True, weight_dtype=None)
    window.check(tensors, misses=False, threshold=hint, keep_ratio=0)
    for bad, mode in zip((torch.nan, torch.inf, -torch.inf), ("value", *MODES)):
        tensors["grad"][3, 7] = bad
        window.check(tensors, misses=False, threshold=hint, mode=mode)
