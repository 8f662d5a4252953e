"""Integers whose products are exact, and a bitwise comparison with the reference."""

import torch
from by_name import ByName, oracle
from products import ALL, assert_same

from mft_kernels import reference
from mft_kernels.backends.triton import ops
from mft_kernels.backends.triton.launch import record
from mft_kernels.testing import Inputs, integer_inputs

flat = ByName(ops)

HALF = torch.float16
#: Kinds that shared memory, tensor cores and the tables of tiles distinguish. "tf32" is fp32 with PyTorch's setting.
ARITHMETIC = ("ieee", "tf32", "bfloat16", "float16")


def assert_equals_reference(op, *arguments, **options):
    """Assert that the op of this name gives the reference's results on the CPU."""
    on_cpu = [a.cpu() if isinstance(a, torch.Tensor) else a for a in arguments]
    got, expected = getattr(flat, op)(*arguments, **options), getattr(oracle, op)(*on_cpu)
    for g, e in zip(got, expected) if isinstance(got, tuple) else [(got, expected)]:
        assert_same(g, e)


def integers(device, *shape_and_dtypes, seed=0):
    """Return integer_inputs on the device; no score is 0, so that sign bits and scores have the same signs."""
    t = integer_inputs(*shape_and_dtypes, seed=seed)
    t.scores[t.scores == 0] = 3
    return Inputs(*(value.to(device) for value in vars(t).values()))


def bits_of(scores, threshold, mode):
    """Return (packed mask, sign bits) on the device of scores."""
    packed = reference.pack_mask(scores.cpu(), threshold.cpu(), mode)
    return packed.to(scores.device), reference.pack_signs(scores.cpu())[0].to(scores.device)


def threshold_of(scores, value=2.0):
    return torch.tensor(value, dtype=scores.dtype, device=scores.device)


def arguments_of_backward(t, threshold, mode="magnitude", output_mask=ALL):
    return t.grad_output, t.x, t.weight, t.scores, threshold, mode, output_mask


def launches_of(function):
    with record() as launches:
        function()
    return launches
