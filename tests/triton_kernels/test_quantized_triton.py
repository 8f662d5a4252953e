"""The triton backend's products over codes are the reference's; the weight is decoded to the bit."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from mft_kernels import masked_linear_quantized, pack_mask, reference
from mft_kernels.backends import table as backends
from mft_kernels.backends.triton import ops
from mft_kernels.backends.triton import quantized as kernels
from mft_kernels.backends.triton.launch import record
from mft_kernels.by_name import ByName, oracle
from mft_kernels.ops import quantized
from mft_kernels.testing import assert_within_budget, random_inputs

flat = ByName(ops)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KINDS = ("nf4", "nf4-dq", "int8", "int4")
# (M, N, K): rows that begin within a byte, within half of a block, and at whole blocks; every height of a tile.
SHAPES = [(1, 1, 1), (17, 34, 67), (40, 9, 96), (5, 40, 128)]


def coded(n, k, kind, device="cpu"):
    """(codes, absmax, what the kernels call the kind) of any numbers."""
    if kind == "int8":
        codes, absmax = torch.randint(-127, 128, (n, k), dtype=torch.int8), [torch.rand(n) + 0.1]
    else:
        blocks = -(-n * k // (32 if kind == "int4" else 64))
        codes, absmax = torch.randint(0, 256, (-(-n * k // 2), 1), dtype=torch.uint8), [torch.rand(blocks) + 0.1]
        if kind == "nf4-dq":
            nested = torch.rand(-(-blocks // 256)), torch.rand(256) * 2 - 1, torch.tensor(0.7)
            absmax = [torch.randint(0, 256, (blocks,), dtype=torch.uint8), *nested]
    return codes.to(device), [scale.to(device) for scale in absmax], kind.removesuffix("-dq")


def of_powers(n, k, kind, device):
    """As coded(), each block or row of -1, 0 or 1 times 1, 2 or 4."""
    codes, absmax, levels = coded(n, k, kind)
    if kind == "int8":
        return (codes % 3 - 1).to(device), [127.0 * 2.0 ** torch.randint(0, 3, (n,)).to(device)], levels
    nibbles = torch.tensor([7, 8, 9] if kind == "int4" else [0, 7, 15], dtype=torch.uint8)
    codes = (nibbles[codes.int() % 3] << 4) | nibbles[codes.int() // 3 % 3]
    absmax[0] = 2.0 ** torch.randint(0, 3, absmax[0].shape)
    if kind == "nf4-dq":
        absmax = [torch.randint(0, 3, absmax[0].shape, dtype=torch.uint8), torch.full_like(absmax[1], 0.5)]
        absmax += [torch.full((256,), 9.0), torch.tensor(0.5)]  # absmax: 0.5 + half of 1, 3 and 7
        absmax[2][:3] = torch.tensor([1.0, 3.0, 7.0])
    return codes.to(device), [scale.to(device) for scale in absmax], levels


def both(where, x, grad, codes, absmax, packed, bias, shape, levels):
    """(y, d_x)"""
    y = where.masked_linear_quantized(x, codes, absmax, packed, bias, shape, levels)
    return y, where.masked_linear_quantized_d_x(grad, codes, absmax, packed, shape, levels)


def integers(device, dtype, *shape):
    return torch.randint(-1, 2, shape).to(device, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_products_of_integers_equal_the_reference(device, kind, dtype):
    for m, n, k in SHAPES:
        codes, absmax, levels = of_powers(n, k, kind, device)
        x, grad, bias = (integers(device, dtype, *size) for size in ((m, k), (m, n), (n,)))
        for packed in (pack_mask(torch.randn(n, k), torch.tensor(1.2)).to(device), None):
            arguments = x, grad, codes, absmax, packed, bias, [n, k], levels
            for got, expected in zip(both(flat, *arguments), both(oracle, *arguments)):
                assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_is_decoded_to_the_bit(device, kind, dtype):
    """The unit matrix of N tokens reads d_x = decoded: also in bf16, which is rounded before it is multiplied."""
    largest = 7e3 if kind == "int4" else 3e4  # by up to 1.1 and a level, in fp16
    sizes = torch.tensor([1e-33, 1e-7, 0.7, largest, 0.0, -0.5])
    for n, k in ((16, 128), (9, 45)):
        codes, absmax, levels = coded(n, k, kind)
        if kind != "nf4-dq":
            absmax = [absmax[0] * sizes.repeat(-(-len(absmax[0]) // 6))[: len(absmax[0])]]
        codes, absmax = codes.to(device), [scale.to(device) for scale in absmax]
        unit = torch.eye(n, dtype=dtype, device=device)
        got = flat.masked_linear_quantized_d_x(unit, codes, absmax, None, [n, k], levels)
        assert torch.equal(got, oracle.dequantize(codes, absmax, [n, k], levels, dtype))


@pytest.mark.parametrize("kind", KINDS)
def test_random_products_err_as_torch_does(device, kind):
    for dtype in (torch.float32, torch.float16):
        m, n, k = 20, 66, 320
        t = random_inputs(m, n, k, dtype)
        codes, absmax, levels = coded(n, k, kind, device)
        packed = pack_mask(t.scores, torch.tensor(0.01)).to(device)
        x, grad, bias = (v.to(device) for v in (t.x, t.grad_output, t.bias))
        arguments = codes, absmax, packed
        got = both(flat, x, grad, *arguments, bias, [n, k], levels)
        theirs = both(oracle, x, grad, *arguments, bias, [n, k], levels)
        dense = oracle.dequantize(codes, absmax, [n, k], levels, dtype).double()
        kept = torch.where(reference.unpack_mask(packed, [n, k]), dense, 0)
        exact = x.double() @ kept.T + bias.double(), grad.double() @ kept
        for ours, same_dtype, value in zip(got, theirs, exact):
            assert_within_budget(ours, same_dtype, value)


def test_a_sum_in_parts_counts_every_element_and_the_bias_once(device, target, monkeypatch):
    plan = kernels.quantized_tiles
    monkeypatch.setattr(kernels, "quantized_tiles", lambda *sizes: replace(plan(*sizes), splits=3))
    for kind, (n, k) in (("nf4", (24, 704)), ("int4", (24, 672)), ("int8", (24, 689))):
        codes, absmax, levels = of_powers(n, k, kind, device)
        x, bias = integers(device, torch.float16, 3, k), integers(device, torch.float16, n)
        arguments = x, codes, absmax, None, bias, [n, k], levels
        with record() as launches:
            flat.masked_linear_quantized(*arguments)
        assert [one.kernel.__name__ for one in launches] == ["_quantized_product_kernel", "_sum_splits_kernel"]
        y = flat.masked_linear_quantized(*arguments)
        assert torch.equal(y, oracle.masked_linear_quantized(*arguments))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, of 0 * Inf beyond the edges
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_finite_stays_in_its_row_and_a_dropped_one_reaches_nothing(device, kind):
    for k in (64, 45):
        codes, absmax, levels = of_powers(9, k, kind, device)
        codes[:] = 1 if kind == "int8" else 255
        if kind == "nf4-dq":  # an entry of the map that block 1 alone takes
            absmax[0].zero_()
            absmax[0][1], absmax[2][5] = 5, torch.inf
        else:
            absmax[0][1] = torch.inf
        dense = oracle.dequantize(codes, absmax, [9, k], levels, torch.float32)
        x = torch.ones(2, k, device=device)
        x[1, 3] = torch.nan
        everything = torch.full((9, -(-k // 32)), -1, dtype=torch.int32, device=device)  # bits beyond K too
        for packed in (None, everything):
            y = flat.masked_linear_quantized(x, codes, absmax, packed, None, [9, k], levels)
            assert torch.equal(y[0], dense.sum(1))
            assert y[1].isnan().all()
        dropped = pack_mask(dense.isfinite().float(), torch.tensor(1.0, device=device))
        y = flat.masked_linear_quantized(x[:1], codes, absmax, dropped, None, [9, k], levels)
        d_x = flat.masked_linear_quantized_d_x(torch.ones(1, 9, device=device), codes, absmax, dropped, [9, k], levels)
        assert y.isfinite().all()
        assert d_x.isfinite().all()


def test_the_op_takes_leading_axes_strides_and_no_tokens_and_has_gradients(device):
    codes, absmax, levels = of_powers(6, 64, "nf4", device)
    named = {"shape": (6, 64), "kind": levels}
    for size in ((2, 3), (0, 3)):
        x = integers(device, torch.float32, 64, *size).movedim(0, -1).requires_grad_()
        bias = integers(device, torch.float32, 6).requires_grad_()
        found = []
        for backend in ("triton", "reference"):
            y = masked_linear_quantized(x, codes, absmax, None, bias, **named, backend=backend)
            found.append((y, *torch.autograd.grad(y.sum(), (x, bias))))
        for got, expected in zip(*found):
            assert torch.equal(got, expected)


class Coded(quantized.QuantizedMatrix):
    """On a GPU, as far as is asked."""

    shape, codes = torch.Size((6, 64)), SimpleNamespace(device=torch.device("cuda"))

    def __init__(self, dtype=torch.bfloat16, kind="nf4"):
        self.dtype, self.kind = dtype, kind

    def levels(self):
        return self.kind


def test_on_a_gpu_layers_decode_in_the_kernel_where_triton_compiles_and_where_cuda_is_asked_for(monkeypatch):
    takes = backends.OPERANDS
    monkeypatch.delenv("MFT_KERNELS", raising=False)

    def is_fused(dtype=torch.bfloat16, **about):
        backend = backends.Backend("triton", frozenset({"cuda"}), frozenset(DTYPES), {}, **about)
        monkeypatch.setitem(backends._TABLE, "triton", backend)
        return Coded().is_fused(torch.empty(1, dtype=dtype))

    assert is_fused(takes=takes)
    assert not is_fused(takes=takes, dtype=torch.float32)  # not the weight's
    assert not is_fused()
    monkeypatch.setenv("MFT_KERNELS", "cuda")
    assert is_fused()  # by the cuda backend's
    assert not Coded(kind="int4").is_fused(torch.empty(1, dtype=torch.bfloat16))  # which takes no int4
    assert not Coded(torch.float32).is_fused(torch.empty(1))
    monkeypatch.delenv("MFT_KERNELS")
    assert not is_fused()
    assert is_fused(takes=takes)
    assert Coded(torch.float32).is_fused(torch.empty(1))
