"""Products over codes: the decoded weight's to the bit; tests/models has NF4 beside bitsandbytes."""

import re
from pathlib import Path

import pytest
import torch
from torch.library import opcheck

import mft_kernels
from benchmarks.bench_memory import process_bytes
from mft_kernels import masked_linear_packed, pack_mask, reference
from mft_kernels.backends import cpu
from mft_kernels.by_name import ByName, oracle
from mft_kernels.codes import FORMATS, Table
from mft_kernels.ops.quantized import masked_linear_quantized_d_x
from mft_kernels.testing import integer_inputs

flat = ByName(cpu)

pytestmark = pytest.mark.skipif(cpu.unavailable is not None, reason=f"cpu backend: {cpu.unavailable}")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KINDS = ("nf4", "nf4-dq", "int8", "int4")
# Rows that begin within a byte, within a block and within half of one; one weight; parts of rows for every path.
SHAPES = [(1, 1), (3, 5), (7, 63), (33, 129), (9, 576), (70, 2050)]
TOKENS = (0, 1, 3, 17, 70, 150)


@pytest.fixture(params=["amx", "amx_emulated", "avx512_bf16", "avx512", "avx2", "portable"])
def capability(request, monkeypatch):
    if request.param not in cpu.capabilities():
        pytest.skip(f"{request.param} is not among {cpu.capabilities()} of this machine and build")
    monkeypatch.setenv("MFT_CPU_CAPABILITY", request.param)
    return request.param


def coded(n, k, kind):
    """(codes, absmax, what the kernels call the kind) of any numbers."""
    if kind == "int8":
        return torch.randint(-127, 128, (n, k), dtype=torch.int8), [torch.rand(n) + 0.1], "int8"
    blocks = -(-n * k // (32 if kind == "int4" else 64))
    codes = torch.randint(0, 256, (-(-n * k // 2), 1), dtype=torch.uint8)
    if kind != "nf4-dq":
        return codes, [torch.rand(blocks) + 0.1], kind
    nested = torch.rand(-(-blocks // 256)), torch.rand(256) * 2 - 1, torch.tensor(0.7)
    return codes, [torch.randint(0, 256, (blocks,), dtype=torch.uint8), *nested], "nf4"


def of_integers(n, k, kind):
    """As coded(), of the integers -2, 0 and 2, and those: of a table the levels -1, 0 and 1 times an absmax."""
    values = torch.randint(-1, 2, (n, k)) * 2
    if kind == "int8":
        return values.to(torch.int8), [torch.full((n,), 127.0)], "int8", values.float()
    levels = [7, 8, 9] if kind == "int4" else [0, 7, 15]
    nibbles = torch.tensor(levels, dtype=torch.uint8)[values // 2 + 1].view(-1)
    nibbles = torch.nn.functional.pad(nibbles, (0, n * k % 2))
    blocks = -(-n * k // (32 if kind == "int4" else 64))
    absmax = [torch.full((blocks,), 2.0)]
    if kind == "nf4-dq":
        nested = torch.full((-(-blocks // 256),), 0.5), torch.arange(256.0), torch.tensor(1.5)
        absmax = [torch.ones(blocks, dtype=torch.uint8), *nested]
    return (nibbles[::2] << 4) | nibbles[1::2], absmax, kind.removesuffix("-dq"), values.float()


def assert_same_bits(got, expected):
    assert (got.dtype, got.shape) == (expected.dtype, expected.shape)
    assert torch.equal(got.view(torch.uint8), expected.view(torch.uint8)), (got, expected)


def paths(product, dtype, *sizes):
    name = str(dtype).removeprefix("torch.")
    return torch.ops.mft_cpu.paths(torch.ops.mft_cpu.capability(), product, name, *sizes, 2.0, 0.125).split(",")


def products(x, grad, weight, codes, absmax, kind, packed, bias):
    """(path, forward pass or d_x over codes, the same over the matrix), by every path that there is."""
    n, k = weight.shape
    every = pack_mask(torch.ones(n, k), torch.tensor(1.0)) if packed is None else packed
    ops, form = torch.ops.mft_cpu, FORMATS[kind]
    table = (form.levels_on(codes.device), form.block) if issubclass(form, Table) else (None, 0)
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
        codes, absmax, levels = coded(n, k, kind)
        weight = flat.dequantize(codes, absmax, [n, k], levels, dtype)
        assert_same_bits(weight, oracle.dequantize(codes, absmax, [n, k], levels, dtype))
        bias = torch.randn(n).to(dtype)
        for m in TOKENS:
            x, grad = torch.randn(m, k).to(dtype), torch.randn(m, n).to(dtype)
            for packed in (pack_mask(torch.randn(n, k), torch.tensor(0.4)), None):
                for path, ours, expected in products(x, grad, weight, codes, absmax, levels, packed, bias):
                    taken.add(path)
                    assert_same_bits(ours, expected)
    assert taken == {"few", "slabs"} | ({"fused"} if capability not in ("avx2", "portable") else set())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_code_is_rounded_once_at_every_size_of_absmax(capability, dtype):
    sizes = torch.tensor(
        [1e-45, 1e-40, 3e-38, 1e-33, 1e-7, 0.7, 3e4, 1e38, 3e38, 0.0, -0.5, float("inf"), float("nan")]
    )
    both = torch.arange(256).to(torch.uint8).repeat(13)
    nf4, int4 = (both, [sizes.repeat_interleave(8)], "nf4"), (both, [sizes.repeat_interleave(16)], "int4")
    int8 = (torch.arange(-128, 128).to(torch.int8).repeat(13, 1), [sizes], "int8")
    for (codes, absmax, levels), shape in ((nf4, [13, 512]), (int4, [13, 512]), (int8, [13, 256])):
        expected = oracle.dequantize(codes, absmax, shape, levels, dtype)
        got = flat.dequantize(codes, absmax, shape, levels, dtype)
        assert torch.equal(got.isnan(), expected.isnan())
        assert_same_bits(got.nan_to_num(nan=1.0), expected.nan_to_num(nan=1.0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_products_of_integers_equal_the_reference(capability, kind, dtype):
    for n, k in SHAPES:
        codes, absmax, levels, values = of_integers(n, k, kind)
        for m in (1, 17):
            t = integer_inputs(m, n, k, dtype)
            for packed in (pack_mask(t.scores, torch.tensor(2.0)), None):
                y = flat.masked_linear_quantized(t.x, codes, absmax, packed, t.bias, [n, k], levels)
                kept = values if packed is None else torch.where(reference.unpack_mask(packed, [n, k]), values, 0)
                assert torch.equal(y, (t.x.float() @ kept.T + t.bias.float()).to(dtype))
                d_x = flat.masked_linear_quantized_d_x(t.grad_output, codes, absmax, packed, [n, k], levels)
                assert torch.equal(d_x, (t.grad_output.float() @ kept).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_threads_change_no_bit(kind, dtype):
    n, k = 1100, 1100
    codes, absmax, levels = coded(n, k, kind)
    packed, before, found = pack_mask(torch.randn(n, k), torch.tensor(0.4)), torch.get_num_threads(), {}
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        try:
            for m in (1, 20, 150):
                x = torch.linspace(-1, 1, m * n).view(m, n).to(dtype)
                for product, bias in ((flat.masked_linear_quantized, [None]), (flat.masked_linear_quantized_d_x, [])):
                    y = product(x, codes, absmax, packed, *bias, [n, k], levels)
                    assert_same_bits(y, found.setdefault((m, product), y))
        finally:
            torch.set_num_threads(before)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="/proc/self/clear_refs is Linux's")
@pytest.mark.parametrize("kind", ["nf4", "int8", "int4"])
def test_no_dense_copy_of_the_weight_is_made(kind):
    n, k = 4096, 4096
    codes, absmax, levels = coded(n, k, kind)
    packed = torch.full((n, k // 32), -1, dtype=torch.int32)

    def peak(work):
        Path("/proc/self/clear_refs").write_text("5")
        before = process_bytes("VmRSS")
        kept = work()
        return process_bytes("VmHWM") - before, kept

    for m in (1, 16, 200):
        x = torch.ones(m, k, dtype=torch.bfloat16)
        for product, bias in ((flat.masked_linear_quantized, [None]), (flat.masked_linear_quantized_d_x, [])):
            added, _ = peak(lambda p=product, b=bias, x=x: p(x, codes, absmax, packed, *b, [n, k], levels))
            assert added < 2 * n * k / 2, f"{m} tokens: {added}"
    added, _ = peak(lambda: flat.dequantize(codes, absmax, [n, k], levels, torch.bfloat16))
    assert added > 2 * n * k * 0.9  # what such a copy would take


# ---------------------------------------------------------------------------------------------- the ops


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_strides_autocast_opcheck_and_compile(kind):
    codes, absmax, levels, values = of_integers(6, 64, kind)
    t = integer_inputs(10, 6, 64, torch.float32)
    packed = pack_mask(t.scores, torch.tensor(2.0))
    kept = torch.where(reference.unpack_mask(packed, [6, 64]), values, 0)
    x, bias = t.x.view(2, 5, 64).requires_grad_(), t.bias.requires_grad_()
    options = {"shape": (6, 64), "kind": levels}

    def eager(x):
        return mft_kernels.masked_linear_quantized(x, codes, absmax, packed, bias, **options)

    grad = t.grad_output.view(2, 5, 6)
    for function in (eager, torch.compile(eager, fullgraph=True, backend="aot_eager")):
        x.grad = bias.grad = None
        y = function(x)
        assert torch.equal(y, x @ kept.T + bias)
        y.backward(grad)
        assert torch.equal(x.grad, grad @ kept)
        assert torch.equal(bias.grad, grad.sum((0, 1)))
    wide = torch.stack([t.x, t.x], -1)[..., 0]
    assert torch.equal(mft_kernels.masked_linear_quantized(wide, codes, absmax, packed, **options), t.x @ kept.T)
    with torch.autocast("cpu", torch.bfloat16):
        assert eager(x).dtype == torch.bfloat16
    ops = torch.ops.mft
    opcheck(ops.masked_linear_quantized, (x, codes, absmax, packed, bias, [6, 64], levels, "auto"))
    opcheck(ops.masked_linear_quantized_d_x, (t.grad_output, codes, absmax, None, [6, 64], levels, "auto"))
    opcheck(ops.dequantize, (codes, absmax, [6, 64], levels, torch.bfloat16, "auto"))
    d_x = masked_linear_quantized_d_x(t.grad_output, codes, absmax, None, **options)
    assert torch.equal(d_x, t.grad_output @ values)


def test_one_product_by_scores_is_one_by_their_bits():
    codes, absmax, levels = coded(40, 64, "nf4")
    scores, threshold, x = torch.randn(40, 64), torch.tensor(0.3), torch.randn(3, 64)
    dense = mft_kernels.dequantize(codes, absmax[0], shape=(40, 64), kind=levels)
    packed = pack_mask(scores, threshold)
    y = mft_kernels.masked_linear_quantized(x, codes, absmax[0], packed, shape=(40, 64), kind=levels)
    assert_same_bits(y, masked_linear_packed(x, dense, packed))
    assert torch.allclose(y, mft_kernels.masked_linear(x, dense, scores, threshold), atol=1e-5)


NESTED = [torch.zeros(6).byte(), torch.zeros(1), torch.zeros(256), torch.tensor(0.0)]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"kind": "fp4"}, ValueError, "kind must be one of ('nf4', 'int8', 'int4'), got 'fp4'"),
        ({"kind": "int4"}, ValueError, "absmax must be (12,) for int4 of (6, 64), got (6,)"),
        ({"kind": "int4", "absmax": NESTED}, ValueError, "absmax must be one tensor for int4, got 4"),
        ({"shape": (6, 66)}, ValueError, "codes must be 198 bytes for nf4 of (6, 66), got (192,)"),
        ({"codes": torch.zeros(6, 64)}, TypeError, "codes must be torch.uint8 for nf4, got torch.float32"),
        ({"absmax": torch.zeros(7)}, ValueError, "absmax must be (6,) for nf4 of (6, 64), got (7,)"),
        ({"absmax": torch.zeros(6).byte()}, TypeError, "absmax must be torch.float32, got torch.uint8"),
        ({"absmax": NESTED[:2]}, ValueError, "absmax must be one tensor, or for nf4 the four of double quantisation"),
        (
            {"absmax": [*NESTED[:2], torch.zeros(16), NESTED[3]]},
            ValueError,
            "absmax[2] must be (256,) for nf4 of (6, 64), got (16,)",
        ),
        ({"x": torch.zeros(2, 63)}, ValueError, "x must end in in_features = 64, got shape (2, 63)"),
        ({"packed": torch.zeros(6, 3).int()}, ValueError, "packed must be (6, 2), 1 bit a weight"),
        ({"bias": torch.zeros(5)}, ValueError, "bias must be (6,), got (5,)"),
        ({"bias": torch.zeros(6).half()}, TypeError, "bias must have x's dtype torch.float32, got torch.float16"),
    ],
)
def test_wrong_arguments_are_named_with_rule_and_value(change, error, message):
    codes, absmax, _, _ = of_integers(6, 64, "nf4")
    arguments = {"x": torch.zeros(2, 64), "codes": codes, "absmax": absmax, "shape": (6, 64)}
    with pytest.raises(error, match=re.escape(message)):
        mft_kernels.masked_linear_quantized(**arguments | change)


@pytest.mark.parametrize(("kind", "blocks", "advice"), [("nf4", 6, ": give all four tensors of .*"), ("int4", 12, "")])
def test_double_quantisation_is_advised_for_nf4_alone(kind, blocks, advice):
    codes, absmax = torch.zeros(192).byte(), torch.zeros(blocks).byte()
    with pytest.raises(TypeError, match=f"^absmax must be torch.float32, got torch.uint8{advice}$"):
        mft_kernels.dequantize(codes, absmax, shape=(6, 64), kind=kind)
