"""Tests specific to CUDA's product with a mask per row: slabs, slices and parts, alignment, schedules.

tests/ops checks that its results are the reference's.
"""

import emulated
import pytest
import torch
from by_name import oracle
from guarded import guarded
from products import assert_same, within

from mft_kernels import reference
from mft_kernels.testing import assert_within_budget, integer_inputs, random_inputs

BF16, FP16 = torch.bfloat16, torch.float16


def masks_of(t, count):
    return [reference.pack_bits(t.scores.roll(shift) > 0) for shift in range(count)]


def mixed(rows, count):
    """Return tasks that differ between neighbours; all tasks and -1 occur if there are enough rows."""
    return torch.arange(rows) * 7 % (count + 1) - 1


def check(t, masks, tasks, **device):
    x = t.x.view(len(tasks), len(t.x) // max(1, len(tasks)), t.x.shape[1])
    for bias in (t.bias, None):
        expected = oracle.masked_linear_many(x, t.weight, masks, tasks, bias)
        assert_same(emulated.masked_linear_many(x, t.weight, masks, tasks, bias, **device), expected)


@pytest.mark.parametrize(
    ("shape", "device"),
    [
        ((12, 24, 4104), {"multiprocessors": 1}),
        ((64, 264, 2056), {"multiprocessors": 4, "shared_bytes": 100 * 1024}),
        ((30, 72, 1096), {"multiprocessors": 132}),
        ((70, 136, 520), {"multiprocessors": 132}),
        ((5, 40, 1031), {"multiprocessors": 132}),
    ],
)
def test_the_depth_in_slabs_slices_and_parts(shape, device):
    t = integer_inputs(*shape, BF16, BF16)
    check(t, masks_of(t, 5), mixed(shape[0], 5), **device)


@pytest.mark.parametrize("rows", [9, 100])
def test_a_task_that_there_is_not_is_nan_in_every_part(rows):
    """Also a task number whose lower half would be a valid task."""
    t = integer_inputs(rows, 24, 520, BF16, BF16)
    tasks = mixed(rows, 2)
    tasks[::4] = torch.tensor([2, -2, 2**32, -(2**40)]).repeat(rows)[: len(tasks[::4])]
    masks, known = masks_of(t, 2), tasks.abs() < 2
    y = emulated.masked_linear_many(t.x, t.weight, masks, tasks, t.bias, multiprocessors=132)
    assert y[~known].isnan().all()
    assert_same(y[known], oracle.masked_linear_many(t.x[known], t.weight, masks, tasks[known], t.bias))
    y = emulated.masked_linear_many(t.x, t.weight, masks, torch.full((rows,), 2), t.bias)
    assert y.isnan().all()


def test_rows_of_any_alignment_are_read_where_they_lie():
    for columns, before, more in ((72, 8, 16), (72, 1, 3), (70, 8, 10)):
        t = integer_inputs(11, 40, columns, BF16, BF16)
        for name in ("x", "weight"):
            setattr(t, name, within(getattr(t, name), before, columns + more))
        expected = oracle.masked_linear_many(t.x, t.weight, masks_of(t, 3), mixed(11, 3), t.bias)
        assert_same(emulated.masked_linear_many(t.x, t.weight, masks_of(t, 3), mixed(11, 3), t.bias), expected)


@pytest.mark.parametrize("at_end", [True, False])
@pytest.mark.parametrize("shape", [(13, 37, 40), (70, 24, 520)])
def test_nothing_outside_the_operands_is_touched(shape, at_end):
    t = integer_inputs(*shape, BF16, BF16)
    for name in ("x", "weight", "bias"):
        setattr(t, name, guarded(getattr(t, name), at_end=at_end))
    masks = [guarded(mask, at_end=at_end) for mask in masks_of(t, 3)]
    tasks = guarded(mixed(shape[0], 3), at_end=at_end)
    for multiprocessors in (1, 132):
        with emulated.outputs_at_guard_pages(at_end=at_end):
            emulated.masked_linear_many(t.x, t.weight, masks, tasks, t.bias, multiprocessors=multiprocessors)


@pytest.mark.parametrize("rows", [14, 50])
def test_a_row_is_the_same_wherever_it_stands_and_whatever_ends_first(rows):
    """Random floats give the same bits in every schedule, within the error budget."""
    t = random_inputs(rows, 136, 1096, BF16, BF16)
    masks, tasks = masks_of(t, 4), mixed(rows, 4)
    results = []
    for seed, asynchrony in enumerate(emulated.ASYNCHRONIES):
        emulated.set_settings(seed, asynchrony, emulated.SCHEDULES[seed % 2])
        order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
        y = emulated.masked_linear_many(t.x[order], t.weight, masks, tasks[order], t.bias, multiprocessors=132)
        results.append(torch.empty_like(y).index_copy_(0, order, y))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    exact = oracle.masked_linear_many(t.x.double(), t.weight.double(), masks, tasks, t.bias.double())
    assert_within_budget(results[0], oracle.masked_linear_many(t.x, t.weight, masks, tasks, t.bias), exact)


def test_fp32_weights_are_refused():
    t = integer_inputs(4, 8, 8, torch.float32, torch.float32)
    with pytest.raises(RuntimeError, match="weight must be bf16 or fp16, got fp32"):
        emulated.masked_linear_many(t.x, t.weight, masks_of(t, 1), mixed(4, 1), None)
