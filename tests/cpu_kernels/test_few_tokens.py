"""The cpu backend's kernels for one and for few tokens, forward and d_x: every remainder of steps, strips, rounds."""

import pytest
import torch
from by_name import ByName
from products import DTYPES, MODES, Operands, assert_equals_reference, every_product

from mft_kernels.backends import cpu
from mft_kernels.testing import integer_inputs, random_inputs

flat = ByName(cpu)
# Emulated AMX tiles are left out: no path for few tokens uses them.
WITHOUT_TILES = ["amx", "avx512_bf16", "avx512", "avx2", "portable"]
pytestmark = pytest.mark.parametrize("capability", WITHOUT_TILES, indirect=True)


@pytest.fixture(autouse=True)
def few(take_path):
    """Take the path for few tokens."""
    take_path("few")


SHAPES = [(1, 1), (31, 33), (32, 32), (33, 31), (5, 70), (70, 5), (17, 100), (100, 17)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", range(1, 17))
def test_products_equal_the_reference_on_integers(capability, m, dtype):
    # Both lengths take every remainder of the steps of 32 columns and of 4, 8 and 16 rows.
    for i, (n, k) in enumerate(SHAPES):
        mode, scores_dtype = MODES[(i + m) % 2], DTYPES[(i + m) % 3]  # tests/ops has each with each dtype
        t = integer_inputs(m, n, k, dtype, scores_dtype, seed=i + m)
        o = Operands.of(t, 1.0 if mode == "magnitude" else -1.0, mode)
        assert_equals_reference(flat, o, gradients=False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", range(1, 17))
def test_products_without_a_mask_equal_torchs_on_integers(capability, m, dtype):
    for i, (n, k) in enumerate([*SHAPES, (40, 300)]):
        t = integer_inputs(m, n, k, dtype, dtype, seed=i + m)
        for bias in (None, t.weight[:, 0].contiguous()):
            expected = torch.nn.functional.linear(
                t.x.double(), t.weight.double(), None if bias is None else bias.double()
            )
            got = cpu.try_linear(t.x, t.weight, bias)
            assert got is not None
            assert torch.equal(got, expected.to(dtype)), (n, k)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 19, 5003), (9, 5003, 19), (1, 24, 9000), (16, 24, 2112), (131, 30, 70)])
def test_long_rows_strips_of_columns_and_turns_of_tokens_meet_without_a_seam(capability, shape, dtype):
    t = integer_inputs(*shape, dtype, torch.bfloat16)
    for v in (t.x, t.grad_output):  # one in 61 is not zero, so sums stay exact
        v *= (torch.arange(v.numel()).view_as(v) % 61 == 0).to(dtype)
    assert_equals_reference(flat, Operands.of(t, 2.0), gradients=False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [1, 3])
def test_neither_threads_nor_other_tokens_change_a_bit(capability, threads, m, dtype):
    o = Operands.of(random_inputs(16, 1100, 1030, dtype, torch.bfloat16), 0.004)  # four threads share it
    few = o.change(lambda v: v[:m].clone(), "x", "grad_output")
    expected = dict(every_product(flat, few, gradients=False))
    for count in (2, 3, 7):
        threads(count)
        for name, got in every_product(flat, few, gradients=False):
            assert torch.equal(got, expected[name]), name
    threads(1)
    for name, got in every_product(flat, o, gradients=False):
        assert torch.equal(got[:m], expected[name]), name
