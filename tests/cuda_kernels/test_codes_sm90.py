"""Products over codes on wgmma, in the emulator: the rings with scales next to TMA, tiles, parts, edges and schedules.

tests/ops/test_quantized.py tests the results, test_plans.py when this kernel is chosen.
"""

import itertools
from functools import partial

import emulated
import pytest
import torch
from by_name import oracle
from coded_weights import Coded, coded
from guarded import guarded
from products import assert_same, within

from mft_kernels import reference
from mft_kernels.testing import assert_within_budget

BF16, FP16 = torch.bfloat16, torch.float16
KINDS = ("nf4", "nf4-dq", "int8")
BY_KIND = pytest.mark.parametrize("kind", KINDS)
HOPPER = {"arch": "sm_90"}
ONE_PART = HOPPER | {"l2_bytes": 0}  # parts may take half of L2
slow = partial(pytest.param, marks=pytest.mark.slow)  # takes seconds in the emulator


def integers(*shape, dtype, seed=1):
    """Return small integers, so that every sum is exact."""
    return torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def mask_of(n, k, seed=2):
    return reference.pack_bits(torch.rand(n, k, generator=torch.Generator().manual_seed(seed)) > 0.4)


def products(by, x, grad, w: Coded, packed, bias, **device):
    """Return (y, d_x)."""
    of_weight = w.codes, w.absmax, packed
    y = by.masked_linear_quantized(x, *of_weight, bias, w.shape, w.kind, **device)
    return y, by.masked_linear_quantized_d_x(grad, *of_weight, w.shape, w.kind, **device)


def operands(m, n, k, kind, dtype, *, masked=True):
    packed = mask_of(n, k) if masked else None
    x, grad, bias = (integers(*shape, dtype=dtype) for shape in ((m, k), (m, n), (n,)))
    return x, grad, coded(n, k, kind, integers=True), packed, bias if masked else None


def check(*given, **device):
    for got, expected in zip(products(emulated, *given, **HOPPER | device), products(oracle, *given), strict=True):
        assert_same(got, expected, small=False)


@BY_KIND
@pytest.mark.parametrize(
    ("dtype", "seed", "asynchrony"),
    [(BF16, 0, "at_issue"), (FP16, 1, "as_late_as_possible"), (BF16, 2, "random"), slow(FP16, 3, "random")],
)
def test_results_are_exact_however_the_background_work_is_timed(kind, dtype, seed, asynchrony):
    emulated.set_settings(seed, asynchrony, emulated.SCHEDULES[seed % 2])
    check(*operands(40, 256, 256, kind, dtype))


@pytest.mark.parametrize(("tokens", "multiprocessors"), [(130, 2), slow(70, 6), slow(300, 4)])
@pytest.mark.parametrize("kind", ["nf4-dq", "int8"])
def test_every_tile_is_made_once_by_any_number_of_clusters(kind, tokens, multiprocessors):
    """The rings continue from tile to tile: there are more steps than stages."""
    check(*operands(tokens, 520, 640, kind, BF16), multiprocessors=multiprocessors)


@BY_KIND
@pytest.mark.parametrize(("m", "n", "k"), [(1, 8, 64), (5, 136, 192), (65, 72, 320)])
def test_edges_are_cut_and_filled_with_zeros(m, n, k, kind):
    """Odd numbers of steps, and steps whose scales are partly outside; all weights are kept."""
    check(*operands(m, n, k, kind, FP16, masked=False))


@BY_KIND
def test_rows_of_tokens_may_lie_apart(kind):
    x, grad, *rest = operands(5, 136, 128, kind, BF16)
    check(within(x, 8, 160), within(grad, 8, 160), *rest)


@BY_KIND
@pytest.mark.parametrize("at_end", [True, False])
def test_nothing_outside_the_operands_is_touched(kind, at_end):
    """TMA knows the sizes; threads read scales and bias."""
    x, grad, w, packed, bias = operands(13, 40, 128, kind, BF16)
    x, grad, packed, bias = (guarded(t, at_end=at_end) for t in (x, grad, packed, bias))
    w = w._replace(codes=guarded(w.codes, at_end=at_end), absmax=[guarded(t, at_end=at_end) for t in w.absmax])
    with emulated.outputs_at_guard_pages(at_end=at_end):
        check(x, grad, w, packed, bias)


@pytest.mark.parametrize("dtype", [BF16, FP16])
@BY_KIND
def test_every_weight_is_decoded_to_the_bit(kind, dtype):
    """Products with unit vectors read the weight itself."""
    w = coded(72, 128, kind)
    sizes = torch.tensor([1e-33, 1e-7, 0.7, 3e4, 0.0, -0.5])
    if kind != "nf4-dq":
        scales = w.absmax[0]
        w = w._replace(absmax=[scales.clamp(-1, 1) * sizes.repeat(-(-len(scales) // 6))[: len(scales)]])
    y, d_x = products(emulated, torch.eye(128, dtype=dtype), torch.eye(72, dtype=dtype), w, None, None, **HOPPER)
    assert_same(y, w.dense(dtype).T, small=False)
    assert_same(d_x, w.dense(dtype), small=False)


@BY_KIND
def test_random_floats_give_what_the_dense_kernel_gives_of_the_decoded_weight(kind):
    """The results are equal bit for bit, because both kernels sum in one part."""
    m, n, k = 20, 72, 384
    w, packed = coded(n, k, kind), mask_of(n, k)
    generator = torch.Generator().manual_seed(3)
    x, grad = (torch.randn(m, size, generator=generator).bfloat16() for size in (k, n))
    y, d_x = products(emulated, x, grad, w, packed, None, **ONE_PART)
    dense = w.dense(BF16)
    assert_same(y, emulated.masked_linear_packed(x, dense, packed, None, **ONE_PART))
    backward = (grad, x, dense, packed, None, None, "value", [True, False, False, False])
    assert_same(d_x, emulated.masked_linear_packed_backward(*backward, **ONE_PART)[0])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_what_is_dropped_contributes_nothing(kind, bad):
    """All weights of blocks and rows with a non-finite scale are dropped."""
    n, k = 136, 256
    x, grad, w, packed, bias = operands(9, n, k, kind, BF16)
    scales, kept = w.absmax[0].clone(), reference.unpack_mask(packed, [n, k])
    block = 64 if kind == "nf4" else k
    for i in (0, 5, len(scales) - 1):
        kept.view(-1)[block * i : block * (i + 1)] = False
    packed = reference.pack_bits(kept)
    expected = products(emulated, x, grad, w, packed, bias, **HOPPER)
    for i in (0, 5, len(scales) - 1):
        scales[i] = bad
    got = products(emulated, x, grad, w._replace(absmax=[scales]), packed, bias, **HOPPER)
    for some, all_numbers in zip(got, expected, strict=True):
        assert_same(some, all_numbers, small=False)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_the_op_launches_the_kernel_that_its_plan_has_chosen(kind):
    """Another kernel takes few tokens, this one takes more."""
    for m, own in ((5, False), (70, True)):
        given = operands(m, 512, 256, kind, BF16)
        device = {"arch": "hopper", "multiprocessors": 4}
        asked, _ = emulated.quantized_product(given[0], *given[2][:2], given[3], None, *given[2][2:], transposed=False)
        chosen, expected = (
            emulated.plan(f"product_quantized{of}", asked, device) for of in ("", "_sm90" if own else "_decode")
        )
        assert (chosen.cycles, chosen.tokens, chosen.parts) == (expected.cycles, expected.tokens, expected.parts)
        check(*given, **device)


# --------------------------------------------------------------------------------------------------------- in parts


def by_parts(given, w: Coded, packed, transposed, tokens, parts, **device):
    """Compute the product in tiles of ``tokens`` and in ``parts``; assert that its plan has these."""
    sides = w.codes, w.absmax, packed, None, w.shape, w.kind
    asked, out = emulated.quantized_product(given, *sides, transposed=transposed)
    asked.tokens, asked.parts = tokens, parts
    plan = emulated.plan("product_quantized_sm90", asked, HOPPER | device)
    assert (plan.tokens, plan.parts) == (tokens, parts)
    assert plan.workspace == (parts > 1) * parts * len(given) * -(-w.shape[transposed] // 256) * 256 * 4
    return emulated._quantized(given, asked, out, HOPPER | device)


@BY_KIND
@pytest.mark.parametrize(("tokens", "parts"), [(128, 3), slow(256, 2)])
def test_sums_in_parts_are_exact(kind, tokens, parts):
    """5 pairs of steps: parts of 2, 2 and 1, or of 3 and 2."""
    for transposed, (n, k) in ((False, (264, 640)), (True, (640, 128))):
        _, _, w, packed, _ = operands(1, n, k, kind, BF16)
        given = integers(70, w.shape[not transposed], dtype=BF16)
        got = by_parts(given, w, packed, transposed, tokens, parts, multiprocessors=8)
        of_weight = w.codes, w.absmax, packed
        if transposed:
            expected = oracle.masked_linear_quantized_d_x(given, *of_weight, w.shape, w.kind)
        else:
            expected = oracle.masked_linear_quantized(given, *of_weight, None, w.shape, w.kind)
        assert_same(got, expected, small=False)


@pytest.mark.parametrize("transposed", [False, True])
def test_parts_are_added_in_one_order_and_rounded_once(transposed):
    """Random floats give the same bits, whichever cluster ends first, within the error budget."""
    n, k = (512, 128) if transposed else (128, 512)
    w, packed = coded(n, k, "nf4"), mask_of(n, k)
    given = torch.randn(20, 512, generator=torch.Generator().manual_seed(5)).bfloat16()
    results = []
    for seed, asynchrony in enumerate(emulated.ASYNCHRONIES):
        emulated.set_settings(seed, asynchrony, emulated.SCHEDULES[seed % 2])
        results.append(by_parts(given, w, packed, transposed, 128, 2))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    dense = torch.where(reference.unpack_mask(packed, [n, k]), w.dense(BF16), 0)
    dense = dense if transposed else dense.T
    assert_within_budget(results[0], given @ dense, given.double() @ dense.double())


@pytest.mark.slow
@BY_KIND
def test_many_schedules_give_one_result(kind):
    given = operands(130, 256, 384, kind, BF16)
    for settings in itertools.product(range(2), emulated.ASYNCHRONIES, emulated.SCHEDULES):
        emulated.set_settings(*settings)
        check(*given, multiprocessors=2)


# ----------------------------------------------------------------------------------------------------- what it leaves


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"k": 96}, "in_features must be a multiple of 64, got 96"),
        ({"k": 192}, "the packed mask's rows must begin at multiples of 16 bytes, got a stride of 24 bytes"),
        ({"past": 8}, "the codes must begin at a multiple of 16 bytes, got 8 bytes past one"),
        ({"stride": 129}, "the input's rows must begin at multiples of 16 bytes, got a stride of 258 bytes"),
        ({"dtype": torch.float32}, "x must be of a 16-bit type"),
        ({"m": 0}, "the product is empty"),
    ],
)
def test_what_tma_cannot_read_is_refused_by_name(change, reason):
    given = {"m": 3, "k": 128, "past": 0, "stride": None, "dtype": BF16} | change
    x, _, w, packed, bias = operands(given["m"], 40, given["k"], "int8", given["dtype"])
    if given["stride"]:
        x = within(x, 0, given["stride"])
    if given["past"]:
        room = torch.empty(w.codes.numel() + 16, dtype=torch.int8)
        first = (-room.data_ptr() % 16) + given["past"]
        w = w._replace(codes=room[first : first + w.codes.numel()].view(w.codes.shape).copy_(w.codes))
    with pytest.raises(RuntimeError, match=reason):
        emulated.masked_linear_quantized(x, w.codes, w.absmax, packed, bias, w.shape, w.kind, **HOPPER)
