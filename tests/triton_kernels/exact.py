"""A bitwise comparison of one op with the reference, and the launches of a call."""

import torch
from by_name import ByName, oracle
from products import assert_same

from mft_kernels.backends.triton import ops
from mft_kernels.backends.triton.launch import record

flat = ByName(ops)

HALF = torch.float16


def assert_op_equals_reference(op, *arguments, **options):
    """Assert that the op of this name gives the reference's results on the CPU."""
    on_cpu = [a.cpu() if isinstance(a, torch.Tensor) else a for a in arguments]
    got, expected = getattr(flat, op)(*arguments, **options), getattr(oracle, op)(*on_cpu)
    for g, e in zip(got, expected) if isinstance(got, tuple) else [(got, expected)]:
        assert_same(g, e)


def launches_of(op, *arguments):
    """Return the launches of an op, which are not executed."""
    with record() as launches:
        getattr(flat, op)(*arguments)
    return launches
