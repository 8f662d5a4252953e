"""Tests specific to the CUDA kernels' score_step: blocks, warps, addresses and guard pages.

tests/ops/test_step.py tests the results, which are the same for every backend; test_step_window.py tests the window.
"""

from functools import partial

import emulated
import pytest
import torch
from by_name import oracle
from guarded import guarded
from in_turn import in_turn
from score_steps import (
    DEFAULTS,
    arguments,
    assert_same,
    assert_state_is_the_same,
    assert_steps_equal_the_reference,
    copied,
    scores_of,
)

FORMATS = (torch.float32, torch.bfloat16, torch.int16)
EIGHT_BIT = (True, False)
SCHEMES = pytest.mark.parametrize("eight_bit", EIGHT_BIT, ids=["8bit", "exact"])

pytestmark = pytest.mark.usefixtures("correctly_rounded_sqrt")


@pytest.mark.parametrize(("eight_bit", "dtype", "numel"), in_turn(EIGHT_BIT, FORMATS, [1300, 4096, 2 * 4096 + 1500]))
def test_the_number_of_blocks_changes_no_bit(eight_bit, dtype, numel):
    tensors = arguments((1, numel), dtype, eight_bit)
    results = []
    for seed, multiprocessors in enumerate((1, 1000)):
        emulated.set_settings(seed=seed)
        step = partial(emulated.score_step, multiprocessors=multiprocessors)
        ours, found = assert_steps_equal_the_reference(step, tensors)
        results.append([*ours.values(), *found])
    for one, two in zip(*results):
        assert one is two is None or torch.equal(one, two)


def test_the_order_of_the_warps_changes_nothing():
    tensors = arguments((7, 1111), torch.int16, True)
    for seed in range(10):
        emulated.set_settings(seed, schedule=emulated.SCHEDULES[seed % 2])
        step = partial(emulated.score_step, multiprocessors=1 + seed % 5)
        assert_steps_equal_the_reference(step, tensors, message=f"{seed}")


@SCHEMES
@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_each_tensor_alone_may_be_misaligned(dtype, eight_bit):
    tensors = arguments((21, 260), dtype, eight_bit)
    for shifted in ("scores", "grad", "weight", "exp_avg", "exp_avg_sq"):
        ours, theirs = copied(tensors), copied(tensors)
        memory = torch.empty(ours[shifted].numel() + 1, dtype=ours[shifted].dtype)
        ours[shifted] = memory[1:].view_as(ours[shifted]).copy_(ours[shifted])
        got = emulated.score_step(**ours, **DEFAULTS)
        expected = oracle.score_step(**theirs, **DEFAULTS)
        assert_state_is_the_same(ours, theirs, shifted)
        assert_same("threshold", got[0], expected[0])
        assert_same("packed", got[1], expected[1])


@SCHEMES
@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize("at_end", [True, False])
def test_nothing_outside_the_tensors_is_touched(dtype, at_end, eight_bit):
    for numel in (1, 257, 1024, 2050):
        tensors = arguments((1, numel), dtype, eight_bit, grad_dtype=torch.bfloat16)
        ours = {name: None if t is None else guarded(t, at_end=at_end) for name, t in tensors.items()}
        hint = guarded(scores_of(torch.tensor(0.002), dtype), at_end=at_end)
        options = DEFAULTS | {"threshold": hint, "grad_scale": guarded(torch.tensor(0.5), at_end=at_end)}
        with emulated.outputs_at_guard_pages(at_end=at_end):
            got = emulated.score_step(**ours, **options)
        expected = oracle.score_step(**tensors, **options)
        assert_state_is_the_same(ours, tensors, f"{numel}")
        assert_same("threshold", got[0], expected[0])


def test_what_cannot_be_counted_is_refused_before_anything_moves():
    scores = torch.ones(1, 1).bfloat16()
    asked = emulated.ScoreStep(format=1, rows=2**16, columns=2**16, k=1, threshold=scores.data_ptr())
    with pytest.raises(RuntimeError, match=r"fewer than 2\^32, got 4294967296; use the triton backend"):
        emulated._call("score_step", asked, {})
