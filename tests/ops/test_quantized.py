"""Products over codes of every backend: bitwise those of the decoded weight, and for integers those of the reference.

test_quantized_ops.py tests the public ops; tests/models compares NF4 with bitsandbytes.
"""

import pytest
import torch
from by_name import oracle
from coded_weights import KINDS, PLAIN_KINDS, Coded, coded
from forms import every_backend_but_cuda
from products import assert_same

from mft_kernels import reference
from mft_kernels.backends.table import registered
from mft_kernels.codes import FORMATS
from mft_kernels.testing import assert_within_budget, random_inputs

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = (FP32, BF16, FP16)
pytestmark = every_backend_but_cuda

BY_KIND = pytest.mark.parametrize("kind", KINDS)
BY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)
# (M, N, K): no tokens, one, tiles of 16, 64 and 128; rows that begin within a byte, within a block and at whole blocks.
SHAPES = (
    *((1, 1, 1), (0, 5, 32), (17, 34, 67), (3, 0, 32), (40, 9, 96), (16, 130, 96)),
    *((5, 40, 48), (1, 40, 64), (3, 5, 0), (70, 7, 63), (130, 24, 32)),
)


@pytest.fixture
def kernels(kernels, request):
    """Return the kernels if they take the kind and the dtype of the test."""
    given = request.node.callspec.params
    if "dtype" in given:
        kernels.need(given["dtype"])
    if "kind" in given and not registered(kernels.name).takes_operand(FORMATS[given["kind"]]):
        pytest.skip(f"{kernels.name} takes no {given['kind']}")
    return kernels


def integers(*shape, dtype, seed=1):
    return torch.randint(-1, 2, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def mask_of(n, k):
    return reference.pack_bits(torch.rand(n, k, generator=torch.Generator().manual_seed(2)) > 0.4)


def both(by, device, x, grad, weight, packed, bias):
    """Return (y, d_x)."""
    x, grad, packed, bias = (None if t is None else t.to(device) for t in (x, grad, packed, bias))
    codes, absmax, shape, kind = weight.to(device)
    y = by.masked_linear_quantized(x, codes, absmax, packed, bias, shape, kind)
    return y.cpu(), by.masked_linear_quantized_d_x(grad, codes, absmax, packed, shape, kind).cpu()


def assert_equals_reference(kernels, *operands):
    for got, expected in zip(both(kernels, kernels.device, *operands), both(oracle, "cpu", *operands)):
        assert_same(got, expected)


def assert_decodes(kernels, weight, dtype):
    """Products with unit vectors read the weight itself: d_x all of it, the forward pass its first and last columns."""
    n, k = weight.shape
    dense, codes = weight.dense(dtype), weight.to(kernels.device)
    of_weight = codes.codes, codes.absmax, None
    for rows in (slice(0, 20), slice(max(k - 9, 0), k)):
        x = torch.eye(k, dtype=dtype)[rows].to(kernels.device)
        assert_same(kernels.masked_linear_quantized(x, *of_weight, None, *codes[2:]).cpu(), dense.T[rows], small=False)
    unit = torch.eye(n, dtype=dtype).to(kernels.device)
    assert_same(kernels.masked_linear_quantized_d_x(unit, *of_weight, *codes[2:]).cpu(), dense, small=False)


@BY_DTYPE
@BY_KIND
def test_every_weight_is_decoded_to_the_bit(kernels, kind, dtype):
    """With 45 and 39 columns, blocks begin anywhere in a row. 48 x 352 weights nest more than 256 scales."""
    for n, k in kernels.fewer(((29, 45), (48, 352), (16, 39)), 2):
        weight = coded(n, k, kind)
        assert kind in PLAIN_KINDS or len(weight.absmax[1]) == 1 + (n == 48)
        assert_decodes(kernels, weight, dtype)


@BY_DTYPE
@pytest.mark.parametrize("kind", PLAIN_KINDS)
def test_scales_of_every_size_are_decoded_to_the_bit(kernels, kind, dtype):
    largest = 5e4 / max(map(abs, FORMATS[kind].levels), default=1)  # times a level and up to 1.1, in fp16
    for n, k in kernels.fewer(((9, 45), (16, 128)), 2):
        weight = coded(n, k, kind)
        scales = weight.absmax[0]
        sizes = torch.tensor([1e-33, 1e-7, 0.7, largest, 0.0, -0.5]).repeat(-(-len(scales) // 6))[: len(scales)]
        assert_decodes(kernels, weight._replace(absmax=[sizes * (1 + 0.1 * scales.tanh().abs())]), dtype)


def test_scales_are_rounded_as_the_reference_rounds_them(kernels):
    """absmax / 127 differs from absmax * (1 / 127), and a product must not be rounded before the offset is added."""
    codes, absmax = torch.arange(128), torch.rand(1 << 15, 1, generator=torch.Generator().manual_seed(0))
    other = (codes * (absmax * (1 / torch.tensor(127.0)))).half()
    absmax = absmax[((codes * (absmax / 127)).half() != other).any(1)].flatten()
    assert len(absmax) > 0
    assert_decodes(
        kernels, Coded(codes.to(torch.int8).repeat(len(absmax), 1), [absmax], [len(absmax), 128], "int8"), FP16
    )
    nested = coded(64, 64, "nf4-dq")
    codes, absmax, levels, offset = nested.absmax
    offset.copy_(-levels[codes[5].int()] * absmax[0])
    assert_decodes(kernels, nested, BF16)  # bf16 has the range for the small remainder


@BY_DTYPE
@BY_KIND
def test_products_of_integers_equal_the_reference(kernels, kind, dtype):
    for i, (m, n, k) in enumerate(kernels.fewer(SHAPES, 2)):
        x, grad, bias = (integers(*shape, dtype=dtype) for shape in ((m, k), (m, n), (n,)))
        weight = coded(n, k, kind, integers=True)
        assert_equals_reference(kernels, x, grad, weight, mask_of(n, k), bias)
        if i % 2:
            assert_equals_reference(kernels, x, grad, weight, None, None)


@BY_DTYPE
@BY_KIND
def test_random_products_err_at_most_twice_as_much_as_torch(kernels, kind, dtype):
    m, n, k = 20, 66, 160
    t, weight, packed = random_inputs(m, n, k, dtype), coded(n, k, kind), mask_of(n, k)
    operands = t.x, t.grad_output, weight, packed, t.bias
    got, theirs = both(kernels, kernels.device, *operands), both(oracle, "cpu", *operands)
    dense = torch.where(reference.unpack_mask(packed, [n, k]), weight.dense(dtype).double(), 0)
    exact = t.x.double() @ dense.T + t.bias.double(), t.grad_output.double() @ dense
    for ours, same_dtype, value in zip(got, theirs, exact):
        assert_within_budget(ours, same_dtype, value)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, for 0 * Inf beyond the edges
@BY_KIND
def test_what_is_not_finite_stays_in_its_row_and_a_dropped_one_reaches_nothing(kernels, kind):
    for k in (64, 45):
        weight = coded(9, k, kind, integers=True)
        weight.codes[:] = 255 if FORMATS[kind].packs else 1  # no code stands for level 0
        if kind in PLAIN_KINDS:
            weight.absmax[0][1] = torch.inf
        else:  # a map entry that only block 1 uses
            weight.absmax[0].zero_()
            weight.absmax[0][1], weight.absmax[2][5] = 5, torch.inf
        dense = weight.dense(FP16)
        x, grad = torch.ones(2, k, dtype=FP16), torch.ones(2, 9, dtype=FP16)
        x[1, 3] = torch.nan
        everything = torch.full((9, -(-k // 32)), -1, dtype=torch.int32)  # with bits beyond K too
        for packed in (None, everything):
            y = both(kernels, kernels.device, x, grad, weight, packed, None)[0]
            assert torch.equal(y[0], dense.float().sum(1).half())
            assert y[1].isnan().all()
        dropped = reference.pack_bits(dense.isfinite())
        if k % 32:
            dropped[:, -1] |= -1 << k % 32
        assert_equals_reference(kernels, x[:1], grad, weight, dropped, None)
        for result in both(kernels, kernels.device, x[:1], grad, weight, dropped, None):
            assert result.isfinite().all()


@BY_KIND
def test_operands_may_lie_at_any_address(kernels, kind):
    """Codes begin at an odd byte; scales, bits and tokens lie within other tensors."""

    def moved(t):
        return torch.cat((t.new_ones(1), t.flatten()))[1:].view(t.shape)

    for n, k in ((40, 64), (24, 35)):
        weight, packed = coded(n, k, kind, integers=True).to(kernels.device), mask_of(n, k)
        x, grad, bias = (integers(*shape, dtype=FP16) for shape in ((5, k), (5, n), (n,)))
        expected = both(oracle, "cpu", x, grad, weight.to("cpu"), packed, bias)
        x, grad, packed, bias = (moved(t.to(kernels.device)) for t in (x, grad, packed, bias))
        weight = weight._replace(codes=moved(weight.codes), absmax=[moved(scale) for scale in weight.absmax])
        for got, want in zip(both(kernels, kernels.device, x, grad, weight, packed, bias), expected):
            assert_same(got, want)
        wide = [torch.cat((t, torch.full_like(t, torch.nan)), 1)[:, : t.shape[1]] for t in (x, grad)]
        for got, want in zip(both(kernels, kernels.device, *wide, weight, packed, bias), expected):
            assert_same(got, want)
