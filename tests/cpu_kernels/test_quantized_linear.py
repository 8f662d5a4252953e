"""Products over codes with the cpu backend's paths: bitwise those of the decoded weight, on any threads, no copy.

tests/ops/test_quantized.py tests the results, which are the same for every backend.
"""

import ctypes
from pathlib import Path

import pytest
import torch
from by_name import ByName, oracle
from coded_weights import KINDS, PLAIN_KINDS, coded

from benchmarks.bench_memory import process_bytes
from mft_kernels import pack_mask
from mft_kernels.backends import cpu
from mft_kernels.codes import FORMATS

flat = ByName(cpu)

pytestmark = pytest.mark.skipif(cpu.unavailable is not None, reason=f"cpu backend: {cpu.unavailable}")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Rows that begin within a byte, within a block and within half of one; a single weight; partial rows for every path.
SHAPES = [(1, 1), (3, 5), (7, 63), (33, 129), (9, 576), (70, 2050)]
TOKENS = (0, 1, 3, 17, 70, 150)


def assert_same_bits(got, expected):
    assert (got.dtype, got.shape) == (expected.dtype, expected.shape)
    assert torch.equal(got.view(torch.uint8), expected.view(torch.uint8)), (got, expected)


def paths(product, dtype, *sizes):
    name = str(dtype).removeprefix("torch.")
    return torch.ops.mft_cpu.paths(torch.ops.mft_cpu.capability(), product, name, *sizes, 2.0, 0.125).split(",")


def products(x, grad, weight, given, packed, bias):
    """Yield (path, forward pass or d_x over codes, the same over the matrix), for every path."""
    codes, absmax, (n, k), kind = given
    every = pack_mask(torch.ones(n, k), torch.tensor(1.0)) if packed is None else packed
    ops, form = torch.ops.mft_cpu, FORMATS[kind]
    table = form.levels_on(codes.device), form.block
    of_codes = codes, absmax, packed
    for path in paths("forward", weight.dtype, len(x), n, k):
        ours = ops.masked_linear_quantized(x, *of_codes, bias, n, k, *table, path)
        yield path, ours, ops.masked_linear(x, weight, None, None, every, bias, False, path)
    for path in paths("d_x", weight.dtype, len(x), n, k):
        ours = ops.grad_x_quantized(grad, *of_codes, n, k, *table, path)
        yield path, ours, ops.grad_x(grad, weight, None, None, every, False, path)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_products_are_those_of_the_decoded_weight_to_the_bit_by_every_path(capability, kind, dtype):
    taken = set()
    for n, k in SHAPES:
        given = coded(n, k, kind)
        weight = flat.dequantize(*given, dtype)
        assert_same_bits(weight, given.dense(dtype))
        bias = torch.randn(n).to(dtype)
        for m in TOKENS:
            x, grad = torch.randn(m, k).to(dtype), torch.randn(m, n).to(dtype)
            for packed in (pack_mask(torch.randn(n, k), torch.tensor(0.4)), None):
                for path, ours, expected in products(x, grad, weight, given, packed, bias):
                    taken.add(path)
                    assert_same_bits(ours, expected)
    assert taken == {"few", "slabs"} | ({"fused"} if capability not in ("avx2", "portable") else set())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_code_is_rounded_once_at_every_size_of_absmax(capability, dtype):
    sizes = torch.tensor(
        [1e-45, 1e-40, 3e-38, 1e-33, 1e-7, 0.7, 3e4, 1e38, 3e38, 0.0, -0.5, float("inf"), float("nan")]
    )
    both = torch.arange(256).to(torch.uint8).repeat(13)
    for kind in PLAIN_KINDS:
        form = FORMATS[kind]
        shape = [13, 512 if form.packs else 256]
        codes = both.view(form.code_dtype).view(form.code_shape(shape))
        absmax = [sizes.repeat_interleave(form.scale_count(shape) // 13)]
        expected = oracle.dequantize(codes, absmax, shape, kind, dtype)
        got = flat.dequantize(codes, absmax, shape, kind, dtype)
        assert torch.equal(got.isnan(), expected.isnan())
        assert_same_bits(got.nan_to_num(nan=1.0), expected.nan_to_num(nan=1.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_threads_change_no_bit_of_our_own_products(kind, dtype, threads):
    """Below AVX-512 many tokens take torch's product, which MKL sums in another order with other threads."""
    n, k = 1100, 1100
    codes, absmax, *rest = coded(n, k, kind)
    packed, found = pack_mask(torch.randn(n, k), torch.tensor(0.4)), {}
    for count in (1, 2, 3, 7):
        threads(count)
        for m in (1, 20, 150):
            x = torch.linspace(-1, 1, m * n).view(m, n).to(dtype)
            for product, bias in ((flat.masked_linear_quantized, [None]), (flat.masked_linear_quantized_d_x, [])):
                y = product(x, codes, absmax, packed, *bias, *rest)
                first = found.setdefault((m, product), y)
                if m <= 64 or "fused" in paths("forward", dtype, m, n, k):
                    assert_same_bits(y, first)
                else:
                    torch.testing.assert_close(y, first, rtol=1e-5, atol=1e-5 * first.abs().max().item())


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="/proc/self/clear_refs is Linux's")
@pytest.mark.parametrize("kind", PLAIN_KINDS)
def test_no_dense_copy_of_the_weight_is_made(kind):
    n, k = 4096, 4096
    codes, absmax, *rest = coded(n, k, kind)
    packed = torch.full((n, k // 32), -1, dtype=torch.int32)

    def peak(work):
        ctypes.CDLL(None).malloc_trim(0)  # a copy in memory that earlier tests have freed would not be seen
        Path("/proc/self/clear_refs").write_text("5")
        before = process_bytes("VmRSS")
        kept = work()
        return process_bytes("VmHWM") - before, kept

    for m in (1, 16, 200):
        x = torch.ones(m, k, dtype=torch.bfloat16)
        for product, bias in ((flat.masked_linear_quantized, [None]), (flat.masked_linear_quantized_d_x, [])):
            added, _ = peak(lambda p=product, b=bias, x=x: p(x, codes, absmax, packed, *b, *rest))
            assert added < 2 * n * k / 2, f"{m} tokens: {added}"
    added, _ = peak(lambda: flat.dequantize(codes, absmax, *rest, torch.bfloat16))
    assert added > 2 * n * k * 0.9  # the size of a dense copy
