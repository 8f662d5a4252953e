"""Elements beyond 2^31 are read and written correctly, whatever the tiles."""

from dataclasses import replace

import pytest
import torch
from by_name import oracle
from exact import HALF, assert_op_equals_reference, flat, launches_of
from products import ALL, assert_same, integers

from mft_kernels.backends.triton import ops
from mft_kernels.backends.triton.launch import launch
from mft_kernels.backends.triton.target import interpreting
from mft_kernels.testing import integer_inputs


def far_apart(value, axis):
    """Return the value as a view whose last index on the axis lies beyond 2^31 elements; the gap is not touched."""
    stride = 2**31 // (value.shape[axis] - 1) // 8 * 8 + 8
    strides = (stride, 1) if axis == 0 else (1, stride)
    elements = 1 + sum((size - 1) * step for size, step in zip(value.shape, strides))
    return torch.empty(elements, dtype=value.dtype, device=value.device).as_strided(value.shape, strides).copy_(value)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("name", ["x", "weight", "scores", "grad_output"])
def test_elements_beyond_2_to_the_31_are_read(device, target, name, axis):
    o = integers(9, 16, 24, dtype=HALF, scores_dtype=HALF, device=device).change(lambda v: far_apart(v, axis), name)
    assert_op_equals_reference("masked_linear", *o.forward)
    assert_op_equals_reference("masked_linear", *o.forward, choose=ops.always_scratch)
    assert_op_equals_reference("masked_linear_backward", *o.backward(ALL))


@pytest.mark.parametrize("axis", [0, 1])
def test_elements_beyond_2_to_the_31_are_written(device, target, axis):
    # Repeat the launch of a small product, with the result's strides replaced by those of a view of 2^31 elements.
    o = integers(9, 40, 24, dtype=HALF, device=device)
    (entry,) = launches_of("masked_linear", *replace(o, bias=None).forward)
    out = far_apart(torch.zeros(9, 40, dtype=HALF, device=device), axis)
    places = [i for i, a in enumerate(entry.args) if isinstance(a, torch.Tensor) and a.shape == out.shape]
    assert len(places) == 1
    assert entry.args[-2:] == (40, 1)
    args = (*entry.args[: places[0]], out, *entry.args[places[0] + 1 : -2], *out.stride())
    launch(entry.kernel, entry.grid, *args, **entry.options)
    assert_same(out, oracle.masked_linear(*replace(o.to(torch.device("cpu")), bias=None).forward))


@pytest.mark.skipif(interpreting(), reason="2^31 results are too many for the interpreter")
def test_more_than_2_to_the_31_results_are_written(device):
    n, k = 2**16, 2**15 + 8
    t = integers(16, n, 8, dtype=HALF, device=device)
    x = integer_inputs(16, 1, k, HALF).x.to(device)
    weight = torch.ones((), dtype=HALF, device=device).expand(n, k)
    out = torch.zeros(n, k, dtype=HALF, device=device)
    flat.accumulate_score_grad(out, t.grad_output, x, weight, None, None, "value")
    last = torch.zeros(3, k, dtype=HALF)
    oracle.accumulate_product(last, t.grad_output[:, -3:].cpu(), x.cpu())
    assert_same(out[-3:], last)
    del out
    rows = torch.ones(k, 8, dtype=HALF, device=device)
    y = flat.masked_linear(rows, t.weight, t.scores, t.threshold, None, "magnitude")
    expected = oracle.masked_linear(
        rows[:1].cpu(), t.weight.cpu(), t.scores.cpu(), torch.tensor(2.0), None, "magnitude"
    )
    assert_same(y[-1:], expected)
