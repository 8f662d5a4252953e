"""The cpu backend's kernels for one and for few tokens, forward and d_x: every remainder of steps, strips, rounds."""

from dataclasses import replace

import pytest
import torch
from by_name import ByName, oracle

from mft_kernels import reference
from mft_kernels.backends import cpu
from mft_kernels.testing import Inputs, assert_within_budget, integer_inputs, random_inputs

flat = ByName(cpu)
# Emulated AMX tiles are left out: no path for few tokens uses them.
WITHOUT_TILES = ["amx", "avx512_bf16", "avx512", "avx2", "portable"]
pytestmark = pytest.mark.parametrize("capability", WITHOUT_TILES, indirect=True)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MODES = ("magnitude", "value")
D_X = [True, False, False, False]


@pytest.fixture(autouse=True)
def few(take_path):
    """Take the path for few tokens."""
    take_path("few")


def products(t: Inputs, threshold, mode, backend=flat):
    """Return y with and without bias, and d_x, from the scores and from the packed mask."""
    packed = reference.pack_mask(t.scores, threshold, mode)
    arguments = (t.grad_output, t.x, t.weight)
    return [
        backend.masked_linear(t.x, t.weight, t.scores, threshold, t.bias, mode),
        backend.masked_linear_packed(t.x, t.weight, packed, None),
        backend.masked_linear_backward(*arguments, t.scores, threshold, mode, D_X)[0],
        backend.masked_linear_packed_backward(*arguments, packed, t.scores, None, mode, D_X)[0],
    ]


def assert_equal(got, expected):
    """Assert bitwise equality, except for the payload of NaN."""
    for g, e in zip(got, expected, strict=True):
        assert g.dtype == e.dtype
        assert g.shape == e.shape
        assert torch.equal(g.isnan(), e.isnan())
        assert torch.equal(g.nan_to_num(7).signbit() & (g == 0), e.nan_to_num(7).signbit() & (e == 0))
        assert torch.equal(g.nan_to_num(7), e.nan_to_num(7)), (g, e)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", range(1, 17))
def test_products_equal_the_reference_on_integers(capability, m, dtype):
    # Both lengths take every remainder of the steps of 32 columns and of 4, 8 and 16 rows.
    for i, (n, k) in enumerate([(1, 1), (31, 33), (32, 32), (33, 31), (5, 70), (70, 5), (17, 100), (100, 17)]):
        for scores_dtype in DTYPES:
            mode = MODES[(i + m) % 2]
            t = integer_inputs(m, n, k, dtype, scores_dtype, seed=i + m)
            threshold = torch.tensor(1.0 if mode == "magnitude" else -1.0, dtype=scores_dtype)
            assert_equal(products(t, threshold, mode), products(t, threshold, mode, oracle))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 19, 5003), (9, 5003, 19), (1, 24, 9000), (16, 24, 2112), (131, 30, 70)])
def test_long_rows_strips_of_columns_and_turns_of_tokens_meet_without_a_seam(capability, shape, dtype):
    t = integer_inputs(*shape, dtype, torch.bfloat16)
    for v in (t.x, t.grad_output):  # one in 61 is not zero, so sums stay exact
        v *= (torch.arange(v.numel()).view_as(v) % 61 == 0).to(dtype)
    threshold = torch.tensor(2, dtype=torch.bfloat16)
    assert_equal(products(t, threshold, "magnitude"), products(t, threshold, "magnitude", oracle))


def shifted(v):
    """Return a contiguous copy that begins one element behind an aligned address."""
    memory = torch.empty(v.numel() + 1, dtype=v.dtype)
    return memory[1:].view(v.shape).copy_(v)


@pytest.mark.parametrize("dtype", DTYPES)
def test_misaligned_tensors_give_the_same_bits(capability, dtype):
    t = random_inputs(6, 41, 133, dtype, dtype)
    threshold = torch.tensor(0.01, dtype=dtype)
    moved = Inputs(*(shifted(v) for v in (t.x, t.weight, t.scores, t.bias, t.grad_output)))
    assert_equal(products(moved, threshold, "magnitude"), products(t, threshold, "magnitude"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [1, 3])
def test_neither_threads_nor_other_tokens_change_a_bit(capability, threads, m, dtype):
    t = random_inputs(16, 1100, 1030, dtype, torch.bfloat16)  # large enough for four threads to share
    few = replace(t, x=t.x[:m].clone(), grad_output=t.grad_output[:m].clone())
    threshold = torch.tensor(0.004, dtype=torch.bfloat16)
    expected = products(few, threshold, "magnitude")
    for count in (2, 3, 7):
        threads(count)
        assert_equal(products(few, threshold, "magnitude"), expected)
    threads(1)
    assert_equal([v[:m] for v in products(t, threshold, "magnitude")], expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [1, 16])
def test_error_stays_within_twice_that_of_pytorch(capability, m, dtype):
    t = random_inputs(m, 200, 300, dtype, torch.bfloat16)
    threshold = torch.tensor(0.004, dtype=torch.bfloat16)
    exact = Inputs(*(v.double() for v in (t.x, t.weight, t.scores, t.bias, t.grad_output)))
    results = (products(t, threshold, "magnitude", backend) for backend in (flat, oracle))
    for got, same, want in zip(*results, products(exact, threshold.double(), "magnitude", oracle), strict=True):
        assert_within_budget(got, same, want)
