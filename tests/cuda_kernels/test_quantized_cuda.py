"""Tests specific to CUDA's general product over codes, in the emulator: parts, addresses, schedules, launch width.

test_decode_codes.py tests the product of few tokens. tests/ops/test_quantized.py tests the results, which are the same
for every backend.
"""

import emulated
import pytest
import torch
from by_name import oracle
from coded_weights import Coded, coded
from guarded import guarded
from products import assert_same, within

from mft_kernels import reference

BF16, FP16 = torch.bfloat16, torch.float16
KINDS = ("nf4", "nf4-dq", "int8")
GENERAL = {"arch": "general"}
ONE_PART = GENERAL | {"l2_bytes": 0}  # parts may take half of L2


def integers_like(*shape, dtype, seed=1):
    return torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def mask_of(n, k, seed=2):
    return reference.pack_bits(torch.rand(n, k, generator=torch.Generator().manual_seed(seed)) > 0.4)


def check(x, grad, w: Coded, packed, bias, **device):
    """Check forward and d_x."""
    device = GENERAL | device
    of_weight = w.codes, w.absmax, packed
    forward, d_x = (x, *of_weight, bias, w.shape, w.kind), (grad, *of_weight, w.shape, w.kind)
    y, of_grad = oracle.masked_linear_quantized(*forward), oracle.masked_linear_quantized_d_x(*d_x)
    assert_same(emulated.masked_linear_quantized(*forward, **device), y, "y", small=False)
    assert_same(emulated.masked_linear_quantized_d_x(*d_x, **device), of_grad, "d_x", small=False)


def check_integers(m, n, k, kind, dtype, **device):
    x, grad, bias = (integers_like(*shape, dtype=dtype) for shape in ((m, k), (m, n), (n,)))
    check(x, grad, coded(n, k, kind, integers=True), mask_of(n, k), bias, **device)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("shape", "tokens", "device"),
    [
        ((3, 96, 1120), 16, {"multiprocessors": 132, "shared_bytes": 100 * 1024}),
        ((40, 96, 1088), 64, {"multiprocessors": 4, "shared_bytes": 228 * 1024}),
        ((70, 160, 2112), 128, {"multiprocessors": 3, "shared_bytes": 228 * 1024}),
        ((5, 40, 805), 64, {"multiprocessors": 132}),
    ],
)
def test_the_depth_in_parts(shape, tokens, device, kind):
    """Two to four stages; steps and parts that are not whole."""
    m, n, k = shape
    asked = emulated.quantized_product(*_operands(m, n, k, kind), transposed=False)[0]
    plan = emulated.plan("product_quantized_general", asked, device)
    assert plan.parts > 1
    assert plan.tokens == tokens
    assert plan.workspace == 4 * plan.parts * m * -(-n // 128) * 128
    check_integers(m, n, k, kind, BF16, **device)
    check_integers(m, k, n, kind, FP16, **device)  # d_x in parts


def _operands(m, n, k, kind):
    w = coded(n, k, kind, integers=True)
    return integers_like(m, k, dtype=BF16), w.codes, w.absmax, mask_of(n, k), None, w.shape, w.kind


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_tokens_may_be_whole_chunks_of_16_bytes_or_not(kind):
    for n, k in ((40, 64), (24, 35)):
        w, packed = coded(n, k, kind, integers=True), mask_of(n, k)
        x, grad, bias = (integers_like(*shape, dtype=BF16) for shape in ((5, k), (5, n), (n,)))
        check(within(x, 8, k + 16), within(grad, 8, n + 8), w, packed, bias)
        check(within(x, 1, k + 3), within(grad, 3, n + 1), w, packed, bias)


@pytest.mark.parametrize("at_end", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_outside_the_operands_is_touched(kind, at_end):
    for m, n, k in ((1, 1, 1), (13, 40, 96), (70, 16, 544), (5, 21, 45)):
        w = coded(n, k, kind, integers=True)
        x, grad, bias = (guarded(integers_like(*shape, dtype=BF16), at_end=at_end) for shape in ((m, k), (m, n), (n,)))
        w = w._replace(
            codes=guarded(w.codes, at_end=at_end), absmax=[guarded(scale, at_end=at_end) for scale in w.absmax]
        )
        with emulated.outputs_at_guard_pages(at_end=at_end):
            check(x, grad, w, guarded(mask_of(n, k), at_end=at_end), bias, multiprocessors=132)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [608, 77])
def test_random_floats_give_what_the_product_of_the_decoded_weight_gives(k, kind):
    """Bit for bit equal to the general kernel's in one part; in parts, the same bits in every schedule."""
    m, n = 20, 70
    w, packed = coded(n, k, kind), mask_of(n, k)
    generator = torch.Generator().manual_seed(3)
    x, grad = (torch.randn(m, size, generator=generator).bfloat16() for size in (k, n))
    dense = w.dense(BF16)
    y = emulated.masked_linear_quantized(x, w.codes, w.absmax, packed, None, w.shape, w.kind, **ONE_PART)
    assert_same(y, emulated.masked_linear_packed(x, dense, packed, None, **ONE_PART))
    d_x = emulated.masked_linear_quantized_d_x(grad, w.codes, w.absmax, packed, w.shape, w.kind, **ONE_PART)
    backward = (grad, x, dense, packed, None, None, "value", [True, False, False, False])
    assert_same(d_x, emulated.masked_linear_packed_backward(*backward, **ONE_PART)[0])
    found = []
    for seed, asynchrony in enumerate(emulated.ASYNCHRONIES):
        emulated.set_settings(seed, asynchrony, emulated.SCHEDULES[seed % 2])
        arguments = x, w.codes, w.absmax, packed, None, w.shape, w.kind
        found.append(emulated.masked_linear_quantized(*arguments, multiprocessors=132, **GENERAL))
    assert_same(found[1], found[0])
    assert_same(found[2], found[0])


def test_fp32_tokens_are_refused():
    w = coded(8, 32, "nf4")
    with pytest.raises(RuntimeError, match="x must be bf16 or fp16, got fp32"):
        emulated.masked_linear_quantized(torch.ones(2, 32), w.codes, w.absmax, None, None, w.shape, w.kind)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("multiprocessors", [108, 132])
def test_of_one_token_most_multiprocessors_have_work(multiprocessors, kind):
    for n, k in ((1024, 4096), (4096, 4096), (14336, 4096), (4096, 14336)):
        for transposed in (False, True):
            sides = (n, k) if transposed else (k, n)
            asked = emulated.QuantizedProduct(weight=emulated.Quantized(kind == "nf4", n, k), transposed=transposed)
            for name, side in zip(("in", "out"), sides):
                setattr(asked, name, emulated.Matrix(None, 1, 1, side, side))
            plan = emulated.plan("product_quantized_general", asked, {"multiprocessors": multiprocessors})
            assert plan.tokens == 16
            assert plan.parts * -(-sides[1] // 128) >= 0.8 * multiprocessors
