"""Products over experts in the emulator: against the oracle, bit for bit, whatever rows an expert has."""

from dataclasses import dataclass
from itertools import pairwise

import emulated
import pytest
import torch
from emulated import grouped as emulated_grouped
from guarded import guarded
from test_products_sm80 import same
from torch import Tensor

from mft_kernels import reference
from mft_kernels.by_name import oracle

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
#: None at the ends and between, one, a tile's edge; 3 rows are nobody's.
ROWS, NOBODYS = (0, 1, 7, 0, 33, 16, 0), 3
LAYOUTS = pytest.mark.parametrize("transposed", [False, True], ids=["(E, N, K)", "(E, K, N)"])


@dataclass
class Experts:
    """weight, scores (E, N, K); x (T, K) and grad (T, N); bias (E, N), transposed (E, K), of ``given``'s product."""

    x: Tensor
    grad: Tensor
    weight: Tensor
    scores: Tensor
    threshold: Tensor
    offsets: Tensor
    bias: Tensor
    transposed: bool

    @property
    def given(self) -> Tensor:
        return self.grad if self.transposed else self.x

    @property
    def packed(self) -> Tensor:
        return torch.stack([reference.pack_mask(s, t, "magnitude") for s, t in zip(self.scores, self.threshold)])


def experts(n, k, dtype, scores_dtype=None, *, rows=ROWS, nobodys=NOBODYS, transposed=False, random=False) -> Experts:
    """Small integers, whose sums are exact, or ``random`` floats."""
    generator, total = torch.Generator().manual_seed(0), sum(rows) + nobodys

    def values(most: int, *shape: int) -> Tensor:
        if random:
            return torch.randn(shape, generator=generator)
        return torch.randint(-most, most + 1, shape, generator=generator).float()

    return Experts(
        values(1, total, k).to(dtype),
        values(1, total, n).to(dtype),
        values(2, len(rows), n, k).to(dtype),
        values(3, len(rows), n, k).to(scores_dtype or dtype),
        values(2, len(rows)).abs().to(scores_dtype or dtype),
        torch.tensor(rows).cumsum(0).int(),
        values(1, len(rows), k if transposed else n).to(dtype),
        transposed,
    )


def check_product(t: Experts, mode: str | None, bias: Tensor | None, **device) -> None:
    """mode None: by words."""
    keep = (None, None, t.packed) if mode is None else (t.scores, t.threshold, None)
    arguments = t.given, t.weight, *keep, t.offsets, bias, mode or "value", t.transposed
    same(emulated_grouped.grouped_product(*arguments, **device), oracle.grouped_product(*arguments))


@LAYOUTS
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("sizes", [(45, 37), (16, 32), (136, 72)])
def test_every_row_meets_its_own_expert(sizes, dtype, transposed):
    """Rows that are whole chunks, and not; one tile of features, and two."""
    t = experts(*sizes, dtype, transposed=transposed)
    check_product(t, None, t.bias)
    if sizes[0] % 8 == 0:
        check_product(t, "magnitude", None)
        check_product(t, "value", t.bias)
        check_product(experts(*sizes, dtype, FP32, transposed=transposed), "magnitude", None)
        check_product(experts(*sizes, dtype, FP32, transposed=transposed), "value", t.bias)


@LAYOUTS
def test_experts_of_many_rows_take_tiles_of_128(transposed):
    """More than one of them, and more nobody's rows than a tile has."""
    for rows, nobodys, tokens in (((128, 1, 150), 0, 128), ((2, 0, 66), 80, 64)):
        t = experts(24, 40, BF16, rows=rows, nobodys=nobodys, transposed=transposed)
        if sum(rows) > 64 * len(rows):
            check_product(t, "magnitude", t.bias)
        check_product(t, None, None)
        out = torch.empty(len(t.x), 24)
        asked = t.x, t.weight, None, None, t.packed, t.offsets, None, "value", False, out.bfloat16()
        assert emulated_grouped.tokens_of(emulated_grouped.product(*asked)) == tokens


def test_more_experts_than_a_warp_looks_at_a_time():
    """128, and more; at their edges all kinds of rows."""
    for count in (127, 128, 129, 300):
        rows = [0] * count
        for expert, some in ((0, 2), (3, 1), (4, 65), (126, 3), (127, 1), (128, 2), (255, 1), (256, 70), (299, 1)):
            if expert < count:
                rows[expert] = some
        t = experts(8, 8, BF16, rows=tuple(rows))
        check_product(t, "magnitude", t.bias)
        check_sums(t, "signs", FP32, accumulate=False)


def check_sums(t: Experts, source: str | None, out_dtype: torch.dtype, *, accumulate: bool, mode="magnitude") -> None:
    scores = t.scores.masked_fill(t.scores == 0, 1)
    signs = torch.stack([reference.pack_signs(each)[0] for each in scores])
    sign = {"scores": (t.scores, None), "signs": (None, signs), None: (None, None)}[source]
    weight = None if source is None else t.weight
    before = (torch.arange(t.weight.numel()).view(t.weight.shape) % 5 - 2).to(out_dtype)
    outs = [before.clone() if accumulate else torch.full_like(before, torch.nan) for _ in range(2)]
    for out, run in zip(outs, (emulated_grouped.grouped_score_grad, oracle.grouped_score_grad)):
        run(out, t.grad, t.x, t.offsets, weight, *sign, mode, accumulate)
    same(*outs)


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("source", ["scores", "signs", None])
@pytest.mark.parametrize("sizes", [(45, 37), (136, 72)])
def test_every_expert_s_sums_are_of_its_own_rows(sizes, source, accumulate):
    for dtype, out_dtype in ((BF16, FP32), (FP16, FP16), (BF16, BF16)):
        t = experts(*sizes, dtype, FP32 if out_dtype == FP32 else dtype)
        check_sums(t, source, out_dtype, accumulate=accumulate)
    check_sums(t, source, BF16, accumulate=accumulate, mode="value")


@pytest.mark.parametrize("accumulate", [False, True])
def test_sums_of_experts_without_rows_are_exactly_0_or_as_they_were(accumulate):
    for n, k in ((24, 40), (9, 13), (24, 1)):
        t = experts(n, k, BF16, rows=(0, 5, 0))
        t.weight[0] = torch.inf
        t.weight[2] = torch.nan
        out = torch.full((3, n, k), 7.0)
        emulated_grouped.grouped_score_grad(out, t.grad, t.x, t.offsets, t.weight, t.scores, None, "value", accumulate)
        assert out[[0, 2]].eq(7 if accumulate else 0).all()
        assert not out[1].eq(7 if accumulate else 0).all()


@pytest.mark.parametrize(("n", "k", "rows"), [(24, 40, ()), (24, 0, (2, 0, 1)), (0, 40, (2, 0, 1))])
def test_empty_axes(n, k, rows):
    for transposed in (False, True):
        t = experts(n, k, BF16, rows=rows or (0, 0), nobodys=2 if rows else 0, transposed=transposed)
        check_product(t, None, t.bias)
        check_sums(t, "scores", FP32, accumulate=False)


@LAYOUTS
def test_what_is_dropped_and_what_has_no_rows_may_be_nan(transposed):
    """And what other rows hold: nobody's may be left as they were allocated."""
    t = experts(40, 48, BF16, transposed=transposed)
    keep = torch.stack([reference.keep_mask(s, c, "magnitude") for s, c in zip(t.scores, t.threshold)])
    t.weight[~keep] = torch.nan
    t.weight[0] = t.weight[3] = torch.inf
    t.given[-NOBODYS:] = torch.nan
    t.given[1] = torch.inf  # one of an expert of 7
    check_product(t, None, None)
    check_product(t, "magnitude", t.bias)


@pytest.mark.parametrize("at_end", [True, False])
@pytest.mark.parametrize(
    "offsets",
    [(0, 1, 8, 8, 41, 57, 57), (30, 4, 90, 12, -5, 60, 3), (-7, -7, 2**31 - 1, 0, -(2**31), 61, 60), (0,) * 7],
    ids=["rising", "falling", "beyond", "none"],
)
@pytest.mark.parametrize("sizes", [(40, 72), (9, 13)])
def test_whatever_offsets_hold_nothing_outside_is_touched(sizes, offsets, at_end):
    """And rows are whose the oracle says."""
    for transposed in (False, True):
        t = experts(*sizes, BF16, transposed=transposed)
        t.offsets = torch.tensor(offsets, dtype=torch.int32)
        packed = guarded(t.packed, at_end=at_end)
        for name in ("x", "grad", "weight", "scores", "threshold", "offsets", "bias"):
            setattr(t, name, guarded(getattr(t, name), at_end=at_end))
        with emulated.outputs_at_guard_pages(at_end=at_end):
            for keep in [(None, None, packed)] + [(t.scores, t.threshold, None)] * (sizes[0] % 8 == 0):
                arguments = t.given, t.weight, *keep, t.offsets, t.bias, "magnitude", transposed
                same(emulated_grouped.grouped_product(*arguments), oracle.grouped_product(*arguments))
    out = guarded(torch.full(t.weight.shape, torch.nan), at_end=at_end)
    expected = out.clone()
    arguments = t.grad, t.x, t.offsets, t.weight, t.scores, None, "magnitude", False
    emulated_grouped.grouped_score_grad(out, *arguments)
    oracle.grouped_score_grad(expected, *arguments)
    same(out, expected)


@LAYOUTS
def test_an_expert_s_bits_are_those_of_the_general_kernel_in_every_schedule(transposed, monkeypatch):
    """Random floats: the sums of its rows alone, in one part, whatever ends first."""
    monkeypatch.setattr(emulated, "usual_arch", "general")
    t = experts(136, 104, BF16, rows=(5, 0, 70, 33), random=True, transposed=transposed)
    signs = torch.stack([reference.pack_signs(each)[0] for each in t.scores])
    found = []
    for seed, asynchrony in enumerate(emulated.ASYNCHRONIES):
        emulated.set_settings(seed, asynchrony, emulated.SCHEDULES[seed % 2])
        sums = torch.empty(t.weight.shape)
        arguments = t.given, t.weight, t.scores, t.threshold, None, t.offsets, None, "magnitude", transposed
        y = emulated_grouped.grouped_product(*arguments, shared_bytes=228 * 1024)
        emulated_grouped.grouped_score_grad(sums, t.grad, t.x, t.offsets, t.weight, None, signs, "magnitude", False)
        found.append((y, sums))
    for y, sums in found[1:]:
        assert torch.equal(y, found[0][0])
        assert torch.equal(sums, found[0][1])
    for e, (begin, end) in enumerate(pairwise([0, *t.offsets.tolist()])):
        rows, own = slice(begin, end), (t.weight[e], t.scores[e], t.threshold[e])
        if transposed:
            wanted = (t.x[rows], *own, "magnitude", [True, False, False, False])
            alone = emulated.masked_linear_backward(t.grad[rows], *wanted, l2_bytes=0)[0]
        else:
            alone = emulated.masked_linear(t.x[rows], *own, None, "magnitude", l2_bytes=0)
        assert torch.equal(found[0][0][rows], alone)
        sums = torch.full(own[0].shape, -0.0)
        emulated.accumulate_score_grad(sums, t.grad[rows], t.x[rows], own[0], None, signs[e], "magnitude", l2_bytes=0)
        assert torch.equal(found[0][1][e], sums)


def test_experts_of_a_wider_tensor_are_read_where_they_lie():
    """Apart by any stride: the chunks of one may be whole, and those of the next not."""
    t = experts(24, 40, BF16)
    for rows, columns in ((26, 48), (24, 41), (25, 40)):
        wide = {name: getattr(t, name).new_full((7, rows, columns), torch.nan) for name in ("weight", "scores")}
        for name, tensor in wide.items():
            tensor[:, :24, :40] = getattr(t, name)
            setattr(t, name, tensor[:, :24, :40])
        check_product(t, None, t.bias)
        if columns % 8 == 0:
            check_product(t, "magnitude", t.bias)
        check_sums(t, "scores", FP32, accumulate=True)
    flat = torch.zeros(7 * 24 * 40 + 7, dtype=BF16)
    odd = flat.as_strided((7, 24, 40), (24 * 40 + 1, 40, 1))
    odd.copy_(t.weight)
    t.weight = odd
    check_product(t, None, t.bias)
    check_sums(t, "scores", FP32, accumulate=True)
    t.scores = torch.zeros(7 * 24 * 40 + 7, dtype=BF16).as_strided(odd.shape, odd.stride()).copy_(t.scores)
    check_sums(t, "scores", FP32, accumulate=False)


def test_what_no_kernel_takes_is_refused():
    t = experts(24, 40, FP32)
    with pytest.raises(RuntimeError, match="weight must be bf16 or fp16, got fp32"):
        check_product(t, None, None)
    with pytest.raises(RuntimeError, match="weight must be bf16 or fp16, got fp32"):
        check_sums(t, None, FP32, accumulate=True)
    apart = experts(24, 40, BF16)  # whose second expert's scores begin at no multiple of 16 bytes
    flat = torch.zeros(7 * 961, dtype=BF16)
    apart.scores = flat.as_strided((7, 24, 40), (961, 40, 1)).copy_(apart.scores)
    for other in (experts(24, 40, BF16, FP16), experts(24, 39, BF16), apart):
        with pytest.raises(RuntimeError, match="scores like these must be packed first"):
            check_product(other, "magnitude", None)
