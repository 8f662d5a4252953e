"""The product over codes in the emulator: what the reference decodes, and then its product, bit for bit."""

from typing import NamedTuple

import emulated
import pytest
import torch
from guarded import guarded
from test_products_sm80 import same, within
from torch import Tensor

from mft_kernels import reference
from mft_kernels.by_name import oracle

BF16, FP16 = torch.bfloat16, torch.float16
KINDS = ("nf4", "nested", "int8")
ONE_PART = {"l2_bytes": 0}  # parts lie in half of it


class Weight(NamedTuple):
    """nested: of double quantisation."""

    codes: Tensor
    absmax: list[Tensor]
    shape: list[int]
    kind: str

    def dense(self, dtype: torch.dtype) -> Tensor:
        return oracle.dequantize(self.codes, self.absmax, self.shape, self.kind, dtype)


def weight_of(n, k, kind, *, integers=True, seed=0) -> Weight:
    """``integers``: every weight is a small one, so that sums are exact; else every code, and any scale."""
    generator = torch.Generator().manual_seed(seed)

    def choice(values, *shape):
        return torch.tensor(values)[torch.randint(len(values), shape, generator=generator)]

    def scales(*shape):
        return choice([1.0, 2.0, -3.0], *shape) if integers else torch.randn(shape, generator=generator)

    if kind == "int8":
        codes = choice(range(-4, 5) if integers else range(-128, 128), n, k).to(torch.int8)
        return Weight(codes, [scales(n) * (127 if integers else 1)], [n, k], kind)
    codes = choice([0, 7, 15] if integers else range(16), 2, -(-n * k // 2))  # of which the levels are -1, 0 and 1
    codes, blocks = (codes[0] << 4 | codes[1]).to(torch.uint8), -(-n * k // 64)
    if kind == "nf4":
        return Weight(codes, [scales(blocks)], [n, k], "nf4")
    absmax = [choice(range(256), blocks).to(torch.uint8), scales(-(-blocks // 256)), scales(256), scales(1)[0]]
    return Weight(codes, absmax, [n, k], "nf4")


def integers_like(*shape, dtype, seed=1):
    return torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def mask_of(n, k, seed=2):
    return reference.pack_bits(torch.rand(n, k, generator=torch.Generator().manual_seed(seed)) > 0.4)


def check(x, grad, w, packed, bias, **device):
    arguments = w.codes, w.absmax, packed
    same(
        emulated.masked_linear_quantized(x, *arguments, bias, w.shape, w.kind, **device),
        oracle.masked_linear_quantized(x, *arguments, bias, w.shape, w.kind),
    )
    same(
        emulated.masked_linear_quantized_d_x(grad, *arguments, w.shape, w.kind, **device),
        oracle.masked_linear_quantized_d_x(grad, *arguments, w.shape, w.kind),
    )


def check_integers(m, n, k, kind, dtype, *, packed=True, **device):
    x, grad, bias = (integers_like(*shape, dtype=dtype) for shape in ((m, k), (m, n), (n,)))
    mask = mask_of(n, k) if packed else None
    check(x, grad, weight_of(n, k, kind), mask, bias if packed else None, **device)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_every_code_is_decoded_as_by_the_reference(dtype, kind):
    """By unit vectors, which give the weight itself. Of 45 and 39 columns, blocks begin anywhere in a row."""
    for n, k in ((48, 352), (70, 96), (29, 45), (52, 39)):
        w = weight_of(n, k, kind, integers=False)
        assert kind != "nested" or len(w.absmax[1]) == 1 + (n == 48)
        dense = w.dense(dtype)
        x, grad = torch.eye(k, dtype=dtype), torch.eye(n, dtype=dtype)
        y = emulated.masked_linear_quantized(x[:20], w.codes, w.absmax, None, None, w.shape, w.kind)
        same(y, dense.T[:20])
        y = emulated.masked_linear_quantized(x[-9:], w.codes, w.absmax, None, None, w.shape, w.kind)
        same(y, dense.T[-9:])
        same(emulated.masked_linear_quantized_d_x(grad, w.codes, w.absmax, None, w.shape, w.kind), dense)


def test_scales_are_rounded_as_the_reference_rounds_them():
    """absmax / 127, which absmax * (1 / 127) is not; and a product that is rounded before the offset is added."""
    codes, absmax = torch.arange(128), torch.rand(1 << 15, 1, generator=torch.Generator().manual_seed(0))
    other = (codes * (absmax * (1 / torch.tensor(127.0)))).half()
    absmax = absmax[((codes * (absmax / 127)).half() != other).any(1)].flatten()
    assert len(absmax) > 0
    w = Weight(codes.to(torch.int8).repeat(len(absmax), 1), [absmax], [len(absmax), 128], "int8")
    nested = weight_of(64, 64, "nested", integers=False)
    codes, absmax, levels, offset = nested.absmax
    offset.copy_(-levels[codes[5].int()] * absmax[0])
    for each, dtype in ((w, FP16), (nested, BF16)):  # of which bf16 has room for what would be left
        unit = torch.eye(each.shape[0], dtype=dtype)
        y = emulated.masked_linear_quantized_d_x(unit, each.codes, each.absmax, None, each.shape, each.kind)
        same(y, each.dense(dtype))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("m", "n", "k"),
    [(1, 1, 1), (1, 40, 64), (5, 40, 48), (16, 130, 96), (17, 33, 45), (33, 66, 160), (130, 24, 32), (9, 65, 31)],
)
def test_every_shape(m, n, k, kind):
    """One token, tiles of 16, 64 and 128; tails to both sides; rows that are whole groups, and not."""
    check_integers(m, n, k, kind, BF16)
    if m < 33:
        check_integers(m, n, k, kind, FP16, packed=False)


@pytest.mark.parametrize("kind", KINDS)
def test_empty_axes(kind):
    for m, n, k in ((0, 5, 32), (3, 0, 32), (3, 5, 0)):
        check_integers(m, n, k, kind, BF16)


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
    """Two to four stages, and steps and parts that are not whole."""
    m, n, k = shape
    asked = emulated.quantized_product(*_operands(m, n, k, kind), transposed=False)[0]
    plan = emulated.plan("product_quantized", asked, device)
    assert plan.parts > 1
    assert plan.tokens == tokens
    assert plan.workspace == 4 * plan.parts * m * -(-n // 128) * 128
    check_integers(m, n, k, kind, BF16, **device)
    check_integers(m, k, n, kind, FP16, **device)  # d_x in parts


def _operands(m, n, k, kind):
    w = weight_of(n, k, kind)
    return integers_like(m, k, dtype=BF16), w.codes, w.absmax, mask_of(n, k), None, w.shape, w.kind


@pytest.mark.parametrize("kind", KINDS)
def test_operands_at_any_address(kind):
    """Rows of tokens that are no chunks, codes that begin at an odd byte, scales of another tensor."""
    for n, k in ((40, 64), (24, 35)):
        w = weight_of(n, k, kind)
        x, grad, bias = (integers_like(*shape, dtype=BF16) for shape in ((5, k), (5, n), (n,)))
        moved = [torch.cat((scale.new_ones(1), scale.flatten()))[1:].view(scale.shape) for scale in w.absmax]
        codes = torch.cat((w.codes.new_ones(1), w.codes.flatten()))[1:].view(w.codes.shape)
        packed = torch.cat((torch.ones(1, dtype=torch.int32), mask_of(n, k).flatten()))[1:].view(n, -1)
        check(within(x, 8, k + 16), within(grad, 8, n + 8), w._replace(absmax=moved), packed, bias)
        check(x, grad, w._replace(codes=codes), packed, bias)
        check(within(x, 1, k + 3), within(grad, 3, n + 1), w, packed, bias)


@pytest.mark.parametrize("at_end", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_outside_the_operands_is_touched(kind, at_end):
    for m, n, k in ((1, 1, 1), (13, 40, 96), (70, 16, 544), (5, 21, 45)):
        w = weight_of(n, k, kind)
        x, grad, bias = (guarded(integers_like(*shape, dtype=BF16), at_end=at_end) for shape in ((m, k), (m, n), (n,)))
        w = w._replace(
            codes=guarded(w.codes, at_end=at_end), absmax=[guarded(scale, at_end=at_end) for scale in w.absmax]
        )
        with emulated.outputs_at_guard_pages(at_end=at_end):
            check(x, grad, w, guarded(mask_of(n, k), at_end=at_end), bias, multiprocessors=132)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("columns", [64, 45])
def test_a_dropped_weight_that_is_not_finite_is_zero(columns, kind):
    """Bits behind the last column keep nothing, either."""
    w = weight_of(8, columns, kind)
    w.absmax[0][1] = torch.nan
    w.absmax[0][-1] = torch.inf
    keep = w.dense(BF16).isfinite()
    assert not keep.all()
    packed = reference.pack_bits(keep)
    if columns % 32:
        packed[:, -1] |= -1 << columns % 32
    check(torch.ones(3, columns, dtype=BF16), torch.ones(3, 8, dtype=BF16), w, packed, None)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [608, 77])
def test_random_floats_give_what_the_product_of_the_decoded_weight_gives(k, kind):
    """Bit for bit: the general kernel's, in one part. In parts, the same in every schedule."""
    m, n = 20, 70
    w, packed = weight_of(n, k, kind, integers=False), mask_of(n, k)
    generator = torch.Generator().manual_seed(3)
    x, grad = (torch.randn(m, size, generator=generator).bfloat16() for size in (k, n))
    dense = w.dense(BF16)
    y = emulated.masked_linear_quantized(x, w.codes, w.absmax, packed, None, w.shape, w.kind, **ONE_PART)
    same(y, emulated.masked_linear_packed(x, dense, packed, None, **ONE_PART))
    d_x = emulated.masked_linear_quantized_d_x(grad, w.codes, w.absmax, packed, w.shape, w.kind, **ONE_PART)
    backward = (grad, x, dense, packed, None, None, "value", [True, False, False, False])
    same(d_x, emulated.masked_linear_packed_backward(*backward, **ONE_PART)[0])
    found = []
    for seed, asynchrony in enumerate(emulated.ASYNCHRONIES):
        emulated.set_settings(seed, asynchrony, emulated.SCHEDULES[seed % 2])
        arguments = x, w.codes, w.absmax, packed, None, w.shape, w.kind
        found.append(emulated.masked_linear_quantized(*arguments, multiprocessors=132))
    same(found[1], found[0])
    same(found[2], found[0])


def test_fp32_tokens_are_refused():
    w = weight_of(8, 32, "nf4")
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
            plan = emulated.plan("product_quantized", asked, {"multiprocessors": multiprocessors})
            assert plan.tokens == 16
            assert plan.parts * -(-sides[1] // 128) >= 0.8 * multiprocessors
