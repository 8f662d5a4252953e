"""The triton backend's product with a mask a row is the reference's."""

from dataclasses import replace

import pytest
import torch

from mft_kernels import reference
from mft_kernels.backends.triton import ops
from mft_kernels.backends.triton.launch import record
from mft_kernels.backends.triton.target import assume
from mft_kernels.by_name import ByName, oracle
from mft_kernels.testing import integer_inputs

flat = ByName(ops)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def arguments(rows, n, k, dtype, device, masks=3):
    """x (rows, 2, K), weight, masks, tasks, bias and grad_output."""
    t = integer_inputs(2 * rows, n, k, dtype)
    bits = [reference.pack_bits(t.scores.roll(shift) > 0).to(device) for shift in range(masks)]
    tasks = torch.arange(rows, dtype=torch.int32) * 7 % (masks + 1) - 1
    x, weight, bias, grad = (v.to(device) for v in (t.x, t.weight, t.bias, t.grad_output))
    return x.view(rows, 2, k), weight, bits, tasks.to(device), bias, grad.view(rows, 2, n)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 17, 45), (9, 33, 64), (20, 40, 31), (0, 5, 7), (3, 5, 0), (3, 0, 5)])
def test_every_shape_equals_the_reference(device, dtype, shape):
    for masks in (0, 3):
        x, weight, bits, tasks, bias, grad = arguments(*shape, dtype, device, masks)
        for b in (bias, None):
            expected = oracle.masked_linear_many(x, weight, bits, tasks, b)
            assert torch.equal(flat.masked_linear_many(x, weight, bits, tasks, b), expected)
        d_x = oracle.masked_linear_many_backward(grad, weight, bits, tasks)
        assert torch.equal(flat.masked_linear_many_backward(grad, weight, bits, tasks), d_x)


def test_a_sum_in_parts_counts_every_element_and_the_bias_once(device, target):
    for rows in (3, 20):  # a tile of 16 and of 64 of them
        x, weight, bits, tasks, bias, _ = arguments(rows, 24, 1640, torch.float16, device)
        tasks[0] = 3  # there is no such task, in no part: three masks take the binary of four
        with assume(replace(target, multiprocessors=1000)):
            with record() as launches:
                flat.masked_linear_many(x, weight, bits, tasks, bias)
            assert [one.kernel.__name__ for one in launches] == ["_many_masks_kernel", "_sum_splits_kernel"]
            y = flat.masked_linear_many(x, weight, bits, tasks, bias)
        assert torch.equal(y[1:], oracle.masked_linear_many(x, weight, bits, tasks, bias)[1:])
        assert y[0].isnan().all()


def test_strides_are_read_as_they_are(device):
    x, weight, bits, tasks, bias, _ = arguments(6, 17, 45, torch.float32, device)
    expected = oracle.masked_linear_many(x, weight, bits, tasks, bias)
    strided = weight.T.contiguous().T, [mask.repeat(1, 2)[:, : mask.shape[1]] for mask in bits]
    assert torch.equal(flat.masked_linear_many(x, *strided, tasks.repeat(2)[:6], bias), expected)
    x = x.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(flat.masked_linear_many(x, weight, bits, tasks, bias), expected)


def test_a_dropped_nan_reaches_no_row_and_an_unknown_task_is_nan(device):
    x, weight, bits, *_ = arguments(6, 9, 40, torch.float32, device)
    bits = [torch.full_like(bits[0], -1) for _ in range(2)]
    bits[0][4, 1] = ~1  # drops weight (4, 32)
    weight[4, 32] = torch.nan
    x = torch.ones_like(x)
    y = flat.masked_linear_many(x, weight, bits, torch.tensor([0, 1, 0, -1, 2, -2], device=device), None)
    assert y[[0, 2]].isfinite().all()
    assert not y[[1, 3]].isfinite().all()
    assert y[4:].isnan().all()
