"""Any strides, offsets and sizes beyond 2^31 elements are read and written as they are, and nothing beyond them."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from amx_gemm import amx_gemm
from exact import (
    ALL,
    HALF,
    arguments_of_backward,
    assert_equals_reference,
    assert_every_op_equals_reference,
    assert_same,
    bits_of,
    integers,
    launches_of,
    threshold_of,
)

from mft_kernels.backends.triton import ops
from mft_kernels.backends.triton.launch import launch
from mft_kernels.backends.triton.target import interpreting
from mft_kernels.by_name import ByName, oracle
from mft_kernels.testing import integer_inputs

flat = ByName(ops)


def column_major(value):
    return value.T.contiguous().T


def every_second_column(value):
    return torch.stack([value, torch.full_like(value, torch.nan)], 2).flatten(1)[:, ::2]


def every_second_row(value):
    return torch.stack([value, torch.full_like(value, torch.nan)], 1).flatten(0, 1)[::2]


def misaligned(value):
    return (
        torch.full((value.numel() + 1,), torch.nan, dtype=value.dtype, device=value.device)[1:]
        .view_as(value)
        .copy_(value)
    )


def inside_a_larger_one(value):
    """Rows and columns within a larger matrix of NaN, at an odd offset and with an odd pitch."""
    rows, columns = value.shape
    around = torch.full((rows + 2, columns + 5), torch.nan, dtype=value.dtype, device=value.device)
    return around[1:-1, 3:-2].copy_(value)


LAYOUTS = (column_major, every_second_column, every_second_row, misaligned, inside_a_larger_one)


@pytest.mark.parametrize("dtype", [torch.bfloat16, HALF], ids=str)
def test_the_scratch_product_hands_torch_nothing_that_amx_would_multiply_wrongly(device, dtype):
    t = integers(device, 5, 33, 45, dtype, torch.float32)
    t = replace(t, x=inside_a_larger_one(t.x), grad_output=inside_a_larger_one(t.grad_output))
    t.x[2] = t.grad_output[3] = torch.nan
    threshold = threshold_of(t.scores)
    with amx_gemm():
        y = flat.masked_linear(t.x, t.weight, t.scores, threshold, None, "magnitude", choose=ops.always_scratch)
        arguments = (t.grad_output, t.x, t.weight, t.scores, threshold, "magnitude", [True, False, False, False])
        d_x = flat.masked_linear_backward(*arguments, choose=ops.always_scratch)[0]
    assert y.isnan().any(1).tolist() == [False, False, True, False, False]
    assert d_x.isnan().any(1).tolist() == [False, False, False, True, False]


@pytest.mark.parametrize("shift", range(len(LAYOUTS)))
def test_any_layouts_are_read_as_they_are(device, target, shift):
    # Each tensor meets each layout, and no two tensors have the same.
    t = integers(device, 18, 24, 40, HALF, torch.bfloat16)
    names = ("x", "weight", "scores", "grad_output")
    views = replace(t, **{n: LAYOUTS[(i + shift) % len(LAYOUTS)](getattr(t, n)) for i, n in enumerate(names)})
    assert_every_op_equals_reference(views, threshold_of(t.scores), "magnitude")
    arguments = (views.x, views.weight, views.scores, threshold_of(t.scores), None, "magnitude")
    assert_equals_reference("masked_linear", *arguments, choose=ops.always_scratch)


def test_expanded_inputs_are_read_as_they_are(device, target):
    t = integers(device, 18, 24, 40, HALF, torch.bfloat16)
    one = torch.ones((), dtype=HALF, device=device)
    for views in (
        replace(t, grad_output=one.expand(18, 24)),  # what y.sum().backward() sends
        replace(t, x=t.x[:1].expand(18, 40), scores=t.scores[:, :1].expand(24, 40)),
        replace(t, x=t.x[:, :1].expand(18, 40), weight=t.weight[:1].expand(24, 40)),
    ):
        threshold = threshold_of(t.scores)
        arguments = (views.x, views.weight, views.scores, threshold, None, "magnitude")
        assert_equals_reference("masked_linear", *arguments)
        assert_equals_reference("masked_linear", *arguments, choose=ops.always_scratch)
        assert_equals_reference("masked_linear_backward", *arguments_of_backward(views, threshold))


def test_packed_words_may_have_strides(device, target):
    t = integers(device, 6, 24, 72, HALF)
    packed, signs = bits_of(t.scores, threshold_of(t.scores), "magnitude")
    packed, signs = column_major(packed), column_major(signs)
    assert_equals_reference("masked_linear_packed", t.x, t.weight, packed, t.bias)
    arguments = (t.grad_output, t.x, t.weight, packed, None, signs, "magnitude", ALL)
    assert_equals_reference("masked_linear_packed_backward", *arguments)


@pytest.mark.parametrize("leading", [(), (1,), (2, 1, 3), (2, 0, 3)])
def test_x_may_have_any_number_of_leading_axes(device, leading):
    m = torch.Size(leading).numel()
    t = integers(device, m, 24, 40, HALF)
    views = replace(t, x=t.x.view(*leading, 40), grad_output=t.grad_output.view(*leading, 24))
    assert_every_op_equals_reference(views, threshold_of(t.scores), "magnitude")
    if len(leading) == 3:  # and where no view makes one axis of them
        views = replace(t, x=views.x.transpose(0, 2), grad_output=views.grad_output.transpose(0, 2))
        assert_every_op_equals_reference(views, threshold_of(t.scores), "magnitude")


def far_apart(value, axis):
    """The value as a view whose last index on the axis lies beyond 2^31 elements; memory between is not touched."""
    stride = 2**31 // (value.shape[axis] - 1) // 8 * 8 + 8
    strides = (stride, 1) if axis == 0 else (1, stride)
    elements = 1 + sum((size - 1) * step for size, step in zip(value.shape, strides))
    return torch.empty(elements, dtype=value.dtype, device=value.device).as_strided(value.shape, strides).copy_(value)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("name", ["x", "weight", "scores", "grad_output"])
def test_elements_beyond_2_to_the_31_are_read(device, target, name, axis):
    t = integers(device, 9, 16, 24, HALF, HALF)
    t = replace(t, **{name: far_apart(getattr(t, name), axis)})
    threshold = threshold_of(t.scores)
    arguments = (t.x, t.weight, t.scores, threshold, t.bias, "magnitude")
    assert_equals_reference("masked_linear", *arguments)
    assert_equals_reference("masked_linear", *arguments, choose=ops.always_scratch)
    assert_equals_reference("masked_linear_backward", *arguments_of_backward(t, threshold))


@pytest.mark.parametrize("axis", [0, 1])
def test_elements_beyond_2_to_the_31_are_written(device, target, axis):
    # The launch of a small product, with the result's strides replaced by those of a view that spans 2^31 elements.
    t = integers(device, 9, 40, 24, HALF)
    arguments = (t.x, t.weight, t.scores, threshold_of(t.scores), None, "magnitude")
    (entry,) = launches_of(lambda: flat.masked_linear(*arguments))
    out = far_apart(torch.zeros(9, 40, dtype=HALF, device=device), axis)
    places = [i for i, a in enumerate(entry.args) if isinstance(a, torch.Tensor) and a.shape == out.shape]
    assert len(places) == 1
    assert entry.args[-2:] == (40, 1)
    args = (*entry.args[: places[0]], out, *entry.args[places[0] + 1 : -2], *out.stride())
    launch(entry.kernel, entry.grid, *args, **entry.options)
    assert_same(out, oracle.masked_linear(*(a.cpu() if isinstance(a, torch.Tensor) else a for a in arguments)))


@pytest.mark.skipif(interpreting(), reason="2^31 results are too many for the interpreter")
def test_more_than_2_to_the_31_results_are_written(device):
    n, k = 2**16, 2**15 + 8
    t = integers(device, 16, n, 8, HALF)
    x = integer_inputs(16, 1, k, HALF).x.to(device)
    weight = torch.ones((), dtype=HALF, device=device).expand(n, k)
    out = torch.zeros(n, k, dtype=HALF, device=device)
    flat.accumulate_score_grad(out, t.grad_output, x, weight, None, None, "value")
    last = torch.zeros(3, k, dtype=HALF)
    oracle.accumulate_product(last, t.grad_output[:, -3:].cpu(), x.cpu())
    assert_same(out[-3:], last)
    del out
    rows = torch.ones(k, 8, dtype=HALF, device=device)
    y = flat.masked_linear(rows, t.weight, t.scores, threshold_of(t.scores), None, "magnitude")
    expected = oracle.masked_linear(
        rows[:1].cpu(), t.weight.cpu(), t.scores.cpu(), torch.tensor(2.0), None, "magnitude"
    )
    assert_same(y[-1:], expected)


@pytest.mark.skipif(not interpreting(), reason="the guard is a page of the CPU's memory")
def test_no_kernel_reads_or_writes_beyond_its_tensors():
    # In a process of its own, which such an access kills.
    script = Path(__file__).with_name("bounds.py")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}  # the package need not be installed
    run = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=environment)
    assert run.stdout == "within bounds\n", (run.returncode, run.stderr)
