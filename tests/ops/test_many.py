"""The product with a mask per row: every backend's equals the reference, one row at a time."""

import pytest
import torch
from by_name import oracle
from forms import every_backend_but_cuda
from guarded import guarded
from products import DTYPES, assert_same, column_major, every_second_row, pitched

from mft_kernels import reference
from mft_kernels.testing import assert_within_budget, integer_inputs, random_inputs

CPU = torch.device("cpu")


def masks_of(t, count):
    """Return the bits of ``count`` masks. The bits of the padding are set, which no kernel may read."""
    masks = [reference.pack_bits(t.scores.roll(shift) > 0) for shift in range(count)]
    if t.scores.shape[1] % 32:
        for mask in masks:
            mask[:, -1] |= -1 << t.scores.shape[1] % 32
    return masks


def tasks_of(rows, count):
    """Return tasks that differ between neighbours; all tasks and -1 occur if there are enough rows."""
    return torch.arange(rows) * 7 % (count + 1) - 1


def operands(kernels, t, count, rows):
    """Return x (rows, tokens per row, K), weight, masks, tasks and bias on the device of the kernels."""
    x = t.x.view(rows, len(t.x) // max(1, rows), t.x.shape[1])
    return [moved(value, kernels.device) for value in (x, t.weight, masks_of(t, count), tasks_of(rows, count), t.bias)]


def moved(value, device):
    """Move the tensor, or each tensor of a list, to the device; None stays None."""
    if isinstance(value, list):
        return [each.to(device) for each in value]
    return value if value is None else value.to(device)


def assert_equals_reference(kernels, x, weight, masks, tasks, bias):
    """Assert the product with the bias and without it."""
    for b in (bias, None):
        given = (x, weight, masks, tasks, b)
        expected = oracle.masked_linear_many(*(moved(value, CPU) for value in given))
        assert_same(kernels.masked_linear_many(*given), expected)


@every_backend_but_cuda
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [0, 1, 3, 16])
def test_every_shape_equals_the_reference(kernels, count, dtype):
    """Up to 16 tokens, up to 64, and more; empty axes; whole words and a partial one; several tokens per task."""
    kernels.need(dtype)
    shapes = [(1, 1, 1, 1), (7, 33, 45, 2), (16, 17, 64, 1), (33, 8, 31, 3), (84, 19, 59, 7), (130, 24, 40, 1)]
    if kernels.name == "triton":  # its interpreter takes seconds
        shapes = shapes[: 2 if count == 16 else 4]
    for i, (tokens, n, k, each) in enumerate([*shapes, (0, 5, 8, 1), (3, 0, 8, 1), (3, 5, 0, 1)]):
        t = integer_inputs(tokens // each * each, n, k, dtype)
        x, weight, masks, tasks, bias = operands(kernels, t, count, tokens // each)
        tasks = tasks.to(torch.int64 if i % 2 else torch.int32)
        assert_equals_reference(kernels, x, weight, masks, tasks, bias)
        grad = t.grad_output.view(*x.shape[:-1], n)
        expected = oracle.masked_linear_many_backward(grad, *(moved(v, CPU) for v in (weight, masks, tasks)))
        d_x = kernels.masked_linear_many_backward(grad.to(kernels.device), weight, masks, tasks)
        assert_same(d_x, expected)


@pytest.mark.parametrize("kernels", ["triton"], indirect=True)  # elsewhere the op checks tasks and refuses it
@pytest.mark.parametrize("rows", [9, 100])
def test_a_task_that_there_is_not_is_nan_and_touches_nobody(kernels, rows):
    """Also a task number whose lower half would be a valid task."""
    t = integer_inputs(rows, 24, 72, torch.bfloat16, torch.bfloat16)
    tasks = tasks_of(rows, 3)
    tasks[::4] = torch.tensor([3, -2, 2**32, -(2**40)]).repeat(rows)[: len(tasks[::4])]
    masks, known = masks_of(t, 3), (tasks >= -1) & (tasks < 3)
    given = [moved(value, kernels.device) for value in (t.x, t.weight, masks, tasks, t.bias)]
    y = kernels.masked_linear_many(*given).cpu()
    assert y[~known].isnan().all()
    assert_same(y[known], oracle.masked_linear_many(t.x[known], t.weight, masks, tasks[known], t.bias))


@every_backend_but_cuda
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_finite_stays_with_its_row_and_its_mask(kernels, dtype):
    kernels.need(dtype)
    t = integer_inputs(20, 24, 40, dtype)
    masks = [torch.full((24, 2), -1, dtype=torch.int32) for _ in range(3)]
    masks[0][4, 1] = ~1  # drops weight (4, 32)
    masks[2][5, 0] = ~2  # drops weight (5, 1)
    t.weight[4, 32], t.weight[5, 1] = torch.nan, torch.inf
    t.x = t.x.abs() + 1
    t.x[3, 7], t.x[11] = torch.nan, torch.inf
    tasks = tasks_of(20, 3)
    expected = oracle.masked_linear_many(t.x, t.weight, masks, tasks, None)
    fine = (tasks == 0) & t.x.isfinite().all(1)
    assert fine.any()
    assert expected[fine, 4].isfinite().all()
    assert_equals_reference(kernels, *(moved(v, kernels.device) for v in (t.x, t.weight, masks, tasks, t.bias)))


@every_backend_but_cuda
def test_strides_are_read_as_they_are(kernels):
    x, weight, masks, tasks, bias = operands(kernels, integer_inputs(12, 17, 45, torch.float16), 3, 6)
    x, weight = pitched(x), every_second_row(weight)
    assert_equals_reference(kernels, x, weight, masks, tasks, bias)
    if kernels.any_strides:
        masks, tasks, weight = [pitched(mask) for mask in masks], pitched(tasks), column_major(weight)
        assert_equals_reference(kernels, x.transpose(0, 1).contiguous().transpose(0, 1), weight, masks, tasks, bias)


@every_backend_but_cuda
@pytest.mark.parametrize("at_end", [True, False])
@pytest.mark.parametrize("shape", [(1, 1, 1), (13, 37, 40), (70, 24, 72), (20, 24, 45)], ids=str)
def test_nothing_outside_the_operands_is_touched(kernels, shape, at_end):
    if kernels.device.type != "cpu":
        pytest.skip("the pages are those of the CPU's memory")
    t = integer_inputs(*shape, torch.bfloat16, torch.bfloat16)
    given = (t.x, t.weight, masks_of(t, 3), tasks_of(shape[0], 3), t.bias)
    x, weight, masks, tasks, bias = (
        [guarded(v, at_end=at_end) for v in value] if isinstance(value, list) else guarded(value, at_end=at_end)
        for value in given
    )
    with kernels.guarded_outputs(at_end=at_end):
        y = kernels.masked_linear_many(x, weight, masks, tasks, bias)
    assert_same(y, oracle.masked_linear_many(*given))


@every_backend_but_cuda
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_random_errors_stay_within_twice_those_of_pytorch(kernels, dtype):
    kernels.need(dtype)
    there = operands(kernels, random_inputs(14, 40, 136, dtype), 4, 14)
    x, weight, masks, tasks, bias = (moved(value, CPU) for value in there)
    y = kernels.masked_linear_many(*there).cpu()
    exact = oracle.masked_linear_many(x.double(), weight.double(), masks, tasks, bias.double())
    assert_within_budget(y, oracle.masked_linear_many(x, weight, masks, tasks, bias), exact)
    for _ in range(2):
        assert torch.equal(kernels.masked_linear_many(*there).cpu(), y)
