"""Products of few tokens over codes in the emulator: results bit for bit, how they are cut, and the kernel.

tests/ops/test_quantized.py tests the results that are common to all kernels over codes.
"""

import emulated
import pytest
import torch
from by_name import oracle
from coded_weights import Coded, coded
from guarded import guarded
from products import assert_same, within
from test_decode import Cut
from test_plans import A100, H100, NVIDIAS, device_of
from test_quantized_cuda import BF16, FP16, KINDS, integers_like, mask_of

from mft_kernels import reference
from mft_kernels.testing import assert_within_budget

BY_KIND = pytest.mark.parametrize("kind", KINDS)
COLUMNS = {"nf4": 128, "nf4-dq": 128, "int8": 64}  # per unit


@pytest.fixture
def cuts(monkeypatch):
    """Return a list of a Cut for every product that is launched."""
    seen, plan = [], emulated.plan

    def noted(kernel, asked, device):
        slices, parts, part_units, slab_units, cluster, features = emulated.decode_cut(asked, device)
        seen.append(Cut(slices, parts, -(-part_units // slab_units), cluster, slices * features))
        return plan(kernel, asked, device)

    monkeypatch.setattr(emulated, "plan", noted)
    return seen


def forward(x, w: Coded, packed, bias, **device):
    arguments = x, w.codes, w.absmax, packed, bias, w.shape, w.kind
    return emulated.masked_linear_quantized(*arguments, arch="decode", **device)


def check(m, n, k, kind, dtype, **device):
    """Check small integers, whose sums are exact, with a packed mask and a bias, and without either."""
    x, bias, w = integers_like(m, k, dtype=dtype), integers_like(n, dtype=dtype), coded(n, k, kind, integers=True)
    for packed, added in ((mask_of(n, k), bias), (None, None)):
        expected = oracle.masked_linear_quantized(x, w.codes, w.absmax, packed, added, w.shape, w.kind)
        assert_same(forward(x, w, packed, added, **device), expected, small=False)


@BY_KIND
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_every_number_of_tokens(dtype, kind):
    for tokens in range(1, 65):
        check(tokens, 40, 224, kind, dtype, capability=(80, 90)[tokens % 2])


@BY_KIND
@pytest.mark.parametrize("multiprocessors", [1, 4, 132])
def test_every_tail(multiprocessors, kind):
    """Rows of whole groups that are not whole units, and features that are not whole tiles."""
    shapes = ((3, 1, 32), (5, 130, 160), (9, 17, 96), (16, 129, 1120), (1, 8, 4128), (2, 300, 64), (20, 33, 352))
    for i, shape in enumerate(shapes):
        check(*shape, kind, (BF16, FP16)[i % 2], multiprocessors=multiprocessors)


@BY_KIND
def test_a_depth_is_cut_among_warps_blocks_clusters_and_slabs(kind, cuts):
    for shape, device in (
        ((16, 24, 4128), {"multiprocessors": 1}),
        ((16, 520, 2080), {"multiprocessors": 4}),
        ((4, 264, 2080), {"multiprocessors": 132}),
        ((2, 24, 2080), {"multiprocessors": 1}),
        ((5, 24, 4128), {"multiprocessors": 132}),
        ((1, 60, 544), {"multiprocessors": 4}),
        ((7, 1032, 288), {"multiprocessors": 17}),
        ((64, 136, 1184), {"multiprocessors": 3, "shared_bytes": 100 * 1024}),
        ((9, 264, 2080), {"multiprocessors": 132, "capability": 90}),
        ((16, 520, 2080), {"multiprocessors": 16, "capability": 90}),
        ((33, 300, 544), {"multiprocessors": 4, "capability": 90}),
        ((3, 136, 4064), {"multiprocessors": 132, "capability": 90}),
        ((64, 264, 4128), {"multiprocessors": 8, "shared_bytes": 100 * 1024, "capability": 90}),
    ):
        check(*shape, kind, FP16, **device)
    assert {cut.slices for cut in cuts} == {1, 2, 4, 8}
    assert max(cut.parts for cut in cuts) > 8
    assert max(cut.slabs for cut in cuts) > 1
    assert {cut.rows for cut in cuts} == {128, 256}
    assert {cut.cluster for cut in cuts} >= {1, 4, 8}


@pytest.mark.parametrize("at_end", [True, False])
@BY_KIND
def test_nothing_outside_the_operands_is_touched(kind, at_end):
    for m, n, k in ((1, 1, 32), (13, 37, 96), (5, 24, 544), (35, 133, 160)):
        w = coded(n, k, kind, integers=True)
        x, bias, packed = integers_like(m, k, dtype=BF16), integers_like(n, dtype=BF16), mask_of(n, k)
        expected = oracle.masked_linear_quantized(x, w.codes, w.absmax, packed, bias, w.shape, w.kind)
        x, bias, packed, codes = (guarded(t, at_end=at_end) for t in (x, bias, packed, w.codes))
        w = w._replace(codes=codes, absmax=[guarded(scale, at_end=at_end) for scale in w.absmax])
        for multiprocessors, capability in ((1, 80), (132, 80), (132, 90)):
            device = {"multiprocessors": multiprocessors, "capability": capability}
            with emulated.outputs_at_guard_pages(at_end=at_end):
                assert_same(forward(x, w, packed, bias, **device), expected, small=False)


@BY_KIND
def test_every_weight_is_decoded_to_the_bit(kind):
    """Products with unit vectors read the weight itself."""
    for dtype, n, k in ((BF16, 48, 352), (FP16, 29, 160)):
        w, x = coded(n, k, kind), torch.eye(k, dtype=dtype)
        for first in range(0, k, 64):
            rows = slice(first, first + 64)
            assert_same(forward(x[rows].contiguous(), w, None, None), w.dense(dtype).T[rows], small=False)


@BY_KIND
def test_a_dropped_weight_that_is_not_finite_reaches_nothing(kind):
    w = coded(9, 192, kind, integers=True)
    w.codes[:] = 1 if kind == "int8" else 255  # no code stands for level 0
    if kind == "nf4-dq":  # a map entry that only block 1 uses
        w.absmax[0].zero_()
        w.absmax[0][1], w.absmax[2][5] = 5, torch.inf
    else:
        w.absmax[0][1] = torch.inf
    packed = reference.pack_bits(w.dense(FP16).isfinite())
    x = torch.ones(11, 192, dtype=FP16)
    x[3, 7], x[10] = torch.nan, torch.inf
    arguments = x, w.codes, w.absmax, packed, None, w.shape, w.kind
    expected = oracle.masked_linear_quantized(*arguments)
    assert expected[[0, 1, 2, 4]].isfinite().all()
    assert_same(forward(x, w, packed, None), expected, small=False)


@BY_KIND
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("shape", [(12, 136, 2080), (5, 264, 1120), (50, 136, 2080)])
def test_sums_are_added_in_one_order_whatever_ends_first(shape, capability, kind, cuts):
    """Random floats give the same bits in every schedule, within the error budget."""
    m, n, k = shape
    generator = torch.Generator().manual_seed(3)
    x, bias = (torch.randn(*size, generator=generator).bfloat16() for size in ((m, k), (n,)))
    w, packed, found = coded(n, k, kind), mask_of(n, k), []
    for seed, asynchrony in enumerate(emulated.ASYNCHRONIES):
        emulated.set_settings(seed, asynchrony, emulated.SCHEDULES[seed % 2])
        found.append(forward(x, w, packed, bias, multiprocessors=132, capability=capability))
    assert all(cut.parts > 1 for cut in cuts)
    assert_same(found[1], found[0])
    assert_same(found[2], found[0])
    theirs = oracle.masked_linear_quantized(x, w.codes, w.absmax, packed, bias, w.shape, w.kind)
    kept = torch.where(reference.unpack_mask(packed, [n, k]), w.dense(BF16).double(), 0)
    assert_within_budget(found[0], theirs, x.double() @ kept.T + bias.double())


def test_strided_rows_of_tokens_are_read_where_they_lie():
    w, x = coded(40, 96, "nf4", integers=True), integers_like(11, 96, dtype=BF16)
    expected = oracle.masked_linear_quantized(x, w.codes, w.absmax, None, None, w.shape, w.kind)
    assert_same(forward(within(x, 8, 96 + 16), w, None, None), expected, small=False)


# ------------------------------------------------------------------------------------------------- cards not here


def asked(m, n, k, kind, *, codes=128, x=128, stride=None, dtype=1, transposed=False):
    """Return a product with operands at these addresses, which nothing reads."""
    weight = emulated.Quantized(kind != "int8", n, k, codes, None if kind == "nf4-dq" else 128)
    product = emulated.QuantizedProduct(weight=weight, transposed=transposed, words=128)
    product.out = emulated.Matrix(128, dtype, m, n, n)
    setattr(product, "in", emulated.Matrix(x, dtype, m, k, stride or k))
    return product


@BY_KIND
@pytest.mark.parametrize("tokens", [1, 8, 16])
def test_an_h100_is_expected_to_gain_by_it(tokens, kind):
    for n, k in ((1024, 1024), (4096, 4096), (11008, 4096), (4096, 14336)):
        product = asked(tokens, n, k, kind)
        few, general = (
            emulated.plan(f"product_quantized_{kernel}", product, device_of(H100)).cycles
            for kernel in ("decode", "general")
        )
        assert emulated.decodes(product, device_of(H100))
        assert emulated.plan("product_quantized", product, device_of(H100)).cycles == few
        assert few < general * (0.99 if kind == "int8" else 0.85), (n, k)


#: In us, for 1, 8 and 16 tokens, from docs/explanation/cuda-kernels.md.
EXPECTED = {
    ("nf4", 4096): (6.2, 6.8, 7.3),
    ("nf4", 11008): (16.2, 16.9, 19.2),
    ("nf4-dq", 4096): (6.1, 6.7, 7.2),
    ("nf4-dq", 11008): (15.8, 16.6, 18.9),
    ("int8", 4096): (8.1, 8.2, 8.4),
    ("int8", 11008): (21.1, 21.2, 24.1),
}


@pytest.mark.parametrize(("kind", "n"), EXPECTED)
def test_the_page_states_what_the_model_expects_of_an_h100(kind, n):
    for tokens, expected in zip((1, 8, 16), EXPECTED[kind, n]):
        plan = emulated.plan("product_quantized", asked(tokens, n, 4096, kind), device_of(H100))
        assert plan.cycles / H100.clock * 1e6 == pytest.approx(expected, abs=0.06)


@BY_KIND
def test_the_model_chooses_the_kernel_that_it_expects_to_be_faster(kind):
    chosen = set()
    for card in NVIDIAS:
        for m in (1, 8, 16, 17, 32, 64):
            for n, k in ((1024, 1024), (4096, 4096), (11008, 4096), (4096, 14336)):
                product = asked(m, n, k, kind)
                taken, few, general = (
                    emulated.plan(f"product_quantized{kernel}", product, device_of(card))
                    for kernel in ("", "_decode", "_general")
                )
                decodes = few.cycles <= general.cycles
                best = few if decodes else general
                assert emulated.decodes(product, device_of(card)) == decodes
                assert (taken.cycles, taken.workspace) == (best.cycles, best.workspace)
                chosen.add(decodes)
    assert chosen == {True, False}


@pytest.mark.parametrize(
    "other",
    [
        asked(65, 4096, 4096, "nf4"),
        asked(1, 4096, 4096, "nf4", transposed=True),
        asked(1, 4096, 4112, "nf4"),
        asked(1, 4096, 4112, "int8"),
        asked(1, 4096, 4096, "nf4", codes=129),
        asked(1, 4096, 4096, "nf4", x=130),
        asked(2, 4096, 4096, "int8", stride=4100),
        asked(1, 1 << 20, 1 << 16, "int8"),
        asked(1, 4096, 4096, "nf4", dtype=0),
        asked(0, 4096, 4096, "nf4"),
        asked(1, 4096, 0, "int8"),
    ],
    ids=["tokens", "d_x", "nf4_rows", "int8_rows", "codes", "x", "stride", "weights", "fp32", "no_tokens", "no_depth"],
)
def test_it_takes_no(other):
    """Each of these goes to the general kernel, or is refused there."""
    for card in (A100, H100):
        assert not emulated.decodes(other, device_of(card))
        assert emulated.plan("product_quantized_decode", other, device_of(card)).tokens == 0


@BY_KIND
def test_every_part_has_something_to_sum_and_clusters_are_whole(kind):
    for card in (A100, H100):
        for tokens in (1, 16, 64):
            for n in (16, 130, 1024):
                for k in range(32, 1500, 96):
                    product = asked(tokens, n, k, kind)
                    _, parts, part_units, _, cluster, _ = emulated.decode_cut(product, device_of(card))
                    assert (parts - 1) * part_units < -(-k // COLUMNS[kind]) <= parts * part_units
                    assert cluster in (1, parts)
