"""Tests specific to the CUDA products over experts, in the emulator: tiles, warps, guard pages, schedules, strides.

tests/ops/test_expert_products.py tests the results, which are the same for every backend.
"""

import emulated
import pytest
import torch
from emulated import grouped
from experts import assert_product_equals_reference, assert_sums_equal_reference, integer_experts
from guarded import guarded

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
LAYOUTS = pytest.mark.parametrize("transposed", [False, True], ids=["(E, N, K)", "(E, K, N)"])


def experts(n, k, dtype=BF16, scores_dtype=None, **options):
    return integer_experts(n, k, dtype, scores_dtype or dtype, **options)


def check_product(t, mode, bias):
    """mode None: by packed mask."""
    mask = (None, None, t.words()) if mode is None else (t.scores, t.threshold, None)
    arguments = t.x, t.weight, *mask, t.offsets, bias, mode or "value", t.transposed
    assert_product_equals_reference(grouped, *arguments)


def check_sums(t, source, out_dtype, *, accumulate):
    assert_sums_equal_reference(grouped, t, source, out_dtype, accumulate=accumulate)


@LAYOUTS
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_features_may_take_two_tiles(dtype, transposed):
    for scores_dtype in (dtype, FP32):
        t = experts(136, 72, dtype, scores_dtype, transposed=transposed)
        for mode, bias in ((None, t.bias), ("magnitude", None), ("value", t.bias)):
            check_product(t, mode, bias)
        check_sums(t, "scores", scores_dtype, accumulate=transposed)


@LAYOUTS
def test_experts_of_many_rows_take_tiles_of_128(transposed):
    """More than one such tile, and more rows without an expert than a tile has."""
    for rows, nobodys, tokens in (((128, 1, 150), 0, 128), ((2, 0, 66), 80, 64)):
        t = experts(24, 40, rows=rows, nobodys=nobodys, transposed=transposed)
        if sum(rows) > 64 * len(rows):
            check_product(t, "magnitude", t.bias)
        check_product(t, None, None)
        out = torch.empty(len(t.x), 24)
        asked = t.x, t.weight, None, None, t.words(), t.offsets, None, "value", transposed, out.bfloat16()
        assert grouped.tokens_of(grouped.product(*asked)) == tokens


def test_more_experts_than_a_warp_looks_at_a_time():
    """A warp looks at 128 experts at a time; all kinds of rows at the edges."""
    for count in (127, 128, 129, 300):
        rows = [0] * count
        for expert, some in ((0, 2), (3, 1), (4, 65), (126, 3), (127, 1), (128, 2), (255, 1), (256, 70), (299, 1)):
            if expert < count:
                rows[expert] = some
        t = experts(8, 8, rows=tuple(rows))
        check_product(t, "magnitude", t.bias)
        check_sums(t, "signs", FP32, accumulate=False)


@pytest.mark.parametrize("at_end", [True, False])
@pytest.mark.parametrize(
    "offsets",
    [(0, 1, 8, 8, 41, 57, 57), (30, 4, 90, 12, -5, 60, 3), (-7, -7, 2**31 - 1, 0, -(2**31), 61, 60), (0,) * 7],
    ids=["rising", "falling", "beyond", "none"],
)
@pytest.mark.parametrize("sizes", [(40, 72), (9, 13)], ids=str)
def test_whatever_offsets_hold_nothing_outside_is_touched(sizes, offsets, at_end):
    """Each row also belongs to the expert that the reference gives it to."""
    for transposed in (False, True):
        t = experts(*sizes, transposed=transposed)
        t.offsets = torch.tensor(offsets, dtype=torch.int32)
        packed = guarded(t.words(), at_end=at_end)
        for name in ("x", "grad_output", "weight", "scores", "threshold", "offsets", "bias"):
            setattr(t, name, guarded(getattr(t, name), at_end=at_end))
        with emulated.outputs_at_guard_pages(at_end=at_end):
            for mask in [(None, None, packed)] + [(t.scores, t.threshold, None)] * (sizes[0] % 8 == 0):
                arguments = t.x, t.weight, *mask, t.offsets, t.bias, "magnitude", transposed
                assert_product_equals_reference(grouped, *arguments)
        # d_scores too.
        out = guarded(torch.full(t.weight.shape, torch.nan), at_end=at_end)
        grouped.grouped_score_grad(out, *t.factors, t.offsets, t.weight, t.scores, None, "magnitude", False)
        assert not out.isnan().any()
        check_sums(t, "scores", FP32, accumulate=False)


@LAYOUTS
def test_an_expert_s_bits_are_those_of_the_general_kernel_in_every_schedule(transposed, monkeypatch):
    """With random floats, an expert's sums are of its own rows only, in one part, whichever block ends first."""
    monkeypatch.setattr(emulated, "usual_arch", "general")
    t = experts(136, 104, rows=(5, 0, 70, 33), transposed=transposed)
    generator = torch.Generator().manual_seed(0)
    for name in ("x", "grad_output", "weight", "scores"):
        value = getattr(t, name)
        setattr(t, name, torch.randn(value.shape, generator=generator).to(value.dtype))
    signs = torch.stack([emulated.pack_signs(each)[0] for each in t.scores])
    found = []
    for seed, asynchrony in enumerate(emulated.ASYNCHRONIES):
        emulated.set_settings(seed, asynchrony, emulated.SCHEDULES[seed % 2])
        sums = torch.empty(t.weight.shape)
        arguments = t.x, t.weight, t.scores, t.threshold, None, t.offsets, None, "magnitude", transposed
        y = grouped.grouped_product(*arguments, shared_bytes=228 * 1024)
        grouped.grouped_score_grad(sums, *t.factors, t.offsets, t.weight, None, signs, "magnitude", False)
        found.append((y, sums))
    for y, sums in found[1:]:
        assert torch.equal(y, found[0][0])
        assert torch.equal(sums, found[0][1])
    for e, rows in enumerate(t.groups()):
        own = t.weight[e], t.scores[e], t.threshold[e]
        left, right = (factor[rows] for factor in t.factors)
        if transposed:
            wanted = (right, *own, "magnitude", [True, False, False, False])
            alone = emulated.masked_linear_backward(left, *wanted, l2_bytes=0)[0]
        else:
            alone = emulated.masked_linear(right, *own, None, "magnitude", l2_bytes=0)
        assert torch.equal(found[0][0][rows], alone)
        sums = torch.full(own[0].shape, -0.0)
        emulated.accumulate_score_grad(sums, left, right, own[0], None, signs[e], "magnitude", l2_bytes=0)
        assert torch.equal(found[0][1][e], sums)


def apart_by_an_odd_stride(matrices):
    """Return the same matrices, each one element further from a multiple of 16 bytes than the one before."""
    experts, n, k = matrices.shape
    memory = torch.zeros(experts * (n * k + 1), dtype=matrices.dtype)
    return memory.as_strided(matrices.shape, (n * k + 1, k, 1)).copy_(matrices)


def test_the_chunks_of_one_expert_may_be_whole_and_those_of_the_next_not():
    t = experts(24, 40)
    t.weight = apart_by_an_odd_stride(t.weight)
    check_product(t, None, t.bias)
    check_sums(t, "scores", FP32, accumulate=True)
    t.scores = apart_by_an_odd_stride(t.scores)
    check_sums(t, "scores", FP32, accumulate=False)


def test_what_no_kernel_takes_is_refused():
    t = experts(24, 40, FP32)
    with pytest.raises(RuntimeError, match="weight must be bf16 or fp16, got fp32"):
        check_product(t, None, None)
    with pytest.raises(RuntimeError, match="weight must be bf16 or fp16, got fp32"):
        check_sums(t, None, FP32, accumulate=True)
    apart = experts(24, 40)
    apart.scores = apart_by_an_odd_stride(apart.scores)
    for other in (experts(24, 40, BF16, FP16), experts(24, 39), apart):
        with pytest.raises(RuntimeError, match="scores like these must be packed first"):
            check_product(other, "magnitude", None)
