"""Forward pass and gradients of the masked product: every backend's equal the reference.

Operands are small integers, and results are compared bit for bit; random operands have an error budget.
"""

from dataclasses import replace

import pytest
import torch
from amx_gemm import amx_gemm
from by_name import oracle
from forms import (
    assert_every_way_equals_the_reference,
    every_form,
    every_form_and_card,
    every_form_and_hopper,
)
from guarded import guarded
from products import (
    BY_COLUMNS,
    BY_ROWS,
    DTYPES,
    INTERPRETING,
    MODES,
    TENSORS,
    Operands,
    assert_no_pitch_is_read,
    assert_rows_are_independent,
    assert_same,
    every_product,
    integers,
    row_thresholds,
)

from mft_kernels import reference
from mft_kernels.testing import assert_within_budget, integer_inputs, random_inputs

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
MATRICES = ("x", "weight", "scores", "grad_output")
# numpy's warnings in the interpreter: sums times an infinite weight
infinite = pytest.mark.filterwarnings(
    "ignore:invalid value:RuntimeWarning", "ignore:overflow encountered:RuntimeWarning"
)


# ------------------------------------------------------------------------------------------- dtypes, shapes, thresholds


@every_form_and_card
@pytest.mark.parametrize("scores_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("mode", "shape"), [("magnitude", (17, 24, 40)), ("value", (5, 37, 59))])
def test_every_dtype_and_mode_equals_the_reference(kernels, mode, shape, dtype, scores_dtype):
    kernels.need(dtype)
    o = integers(*shape, dtype=dtype, scores_dtype=scores_dtype, mode=mode, device=kernels.device)
    assert_every_way_equals_the_reference(kernels, o)


# Single rows, columns and tokens; words and steps that are whole, one short and one over; empty axes.
SHAPES = [(1, 1, 1), (3, 1, 60), (4, 60, 1), (1, 33, 31), (17, 32, 32), (5, 8, 33), (33, 31, 45)]
EMPTY = [(0, 40, 50), (5, 0, 16), (5, 16, 0), (0, 0, 72), (0, 9, 0), (5, 0, 0), (0, 0, 0)]


@every_form
@pytest.mark.parametrize("shape", SHAPES + EMPTY, ids=str)
def test_every_shape_equals_the_reference(kernels, shape):
    dtype, scores_dtype = kernels.dtypes[sum(shape) % len(kernels.dtypes)], DTYPES[shape[0] % 3]
    o = integers(*shape, dtype=dtype, scores_dtype=scores_dtype, device=kernels.device)
    assert_every_way_equals_the_reference(kernels, o)


@every_form_and_hopper
@pytest.mark.parametrize("mode", MODES)
def test_each_row_may_have_a_threshold_of_its_own(kernels, mode):
    t = integer_inputs(17, 48, kernels.columns, BF16, BF16)
    assert_every_way_equals_the_reference(kernels, Operands.of(t, row_thresholds(t), mode).to(kernels.device))


@every_form
@pytest.mark.parametrize("strides", ["sliced", "expanded"])
def test_thresholds_and_bias_may_have_a_stride(kernels, strides):
    """The memory in between is NaN, because reading it could otherwise go unnoticed."""
    t = integer_inputs(17, 40, 40, FP16, FP32)
    o = Operands.of(t, row_thresholds(t) if strides == "sliced" else torch.full((40,), 2.0)).to(kernels.device)

    def strided(vector):
        pairs = torch.stack([vector, torch.full_like(vector, torch.nan)], 1)
        return pairs[:, 0] if strides == "sliced" else pairs[0, :1].expand(40)

    o = o.change(strided, *(("threshold", "bias") if kernels.any_strides else ("threshold",)))
    assert_every_way_equals_the_reference(kernels, o)


@every_form
@pytest.mark.parametrize("mode", MODES)
def test_ties_at_the_threshold_are_kept_and_so_can_be_all_or_none(kernels, mode):
    for threshold in (2.0, 3.0, 0.0, -1.0, 9.0, torch.inf, -torch.inf, torch.nan):
        o = integers(6, 24, 40, threshold=threshold, mode=mode, device=kernels.device)
        assert_every_way_equals_the_reference(kernels, o, gradients=False)


@every_form
def test_every_output_mask_gives_what_it_asks_for_and_nothing_else(kernels):
    o = integers(17, 24, 40, device=kernels.device)
    for wanted in range(16):
        output_mask = [bool(wanted >> i & 1) for i in range(4)]
        for by, on in ((kernels, o), (oracle, o.to(torch.device("cpu")))):
            given = (on.grad_output, on.x, on.weight)
            results = [
                *by.masked_linear_backward(*given, on.scores, on.threshold, on.mode, output_mask),
                *by.masked_linear_packed_backward(*given, on.packed, None, on.signs, on.mode, output_mask),
            ]
            if by is kernels:
                got = results
        for ours, expected in zip(got, results, strict=True):
            assert_same(ours, expected, str(output_mask))


# ------------------------------------------------------------------------------------------------------------- layouts


@every_form_and_hopper
@pytest.mark.parametrize("shift", range(4))
def test_any_layouts_are_read_as_they_are(kernels, shift):
    """Each matrix takes each layout of rows, and the next matrix takes a different one."""
    t = integer_inputs(18, 24, kernels.columns, FP16, FP16)
    o = Operands.of(t, 2.0).to(kernels.device)
    layouts = BY_ROWS if kernels.columns == 40 else BY_ROWS[:1]  # rows of Hopper's tiles begin at whole chunks
    for i, name in enumerate(MATRICES):
        o = o.change(layouts[(i + shift) % len(layouts)], name)
    assert_every_way_equals_the_reference(kernels, o)


@every_form
@pytest.mark.parametrize("shift", range(2))
def test_columns_and_words_may_have_strides(kernels, shift):
    if not kernels.any_strides:
        pytest.skip(f"{kernels.name}'s bindings copy what has no unit stride")
    o = integers(6, 24, 72, scores_dtype=BF16, device=kernels.device)
    for i, name in enumerate(MATRICES):
        o = o.change(BY_COLUMNS[(i + shift) % 2], name)
    assert_every_way_equals_the_reference(kernels, o.change(BY_COLUMNS[0], "packed", "signs"))


@every_form
def test_expanded_inputs_are_read_as_they_are(kernels):
    o = integers(18, 24, 40, scores_dtype=BF16, device=kernels.device)
    assert_every_way_equals_the_reference(kernels, o.change(lambda v: v[:1].expand(v.shape), "x", "scores", "weight"))
    if kernels.any_strides:
        o = o.change(lambda v: torch.ones((), dtype=v.dtype, device=v.device).expand(v.shape), "grad_output")
        assert_every_way_equals_the_reference(kernels, o.change(lambda v: v[:, :1].expand(v.shape), "x", "scores"))


@every_form
@pytest.mark.parametrize("leading", [(), (1,), (2, 1, 3), (2, 0, 3)], ids=str)
def test_x_may_have_any_number_of_leading_axes(kernels, leading):
    o = integers(torch.Size(leading).numel(), 24, 40, device=kernels.device)
    o = o.change(lambda v: v.view(*leading, v.shape[1]), "x", "grad_output")
    assert_every_way_equals_the_reference(kernels, o)
    if len(leading) == 3:  # also if no view makes one axis of them
        assert_every_way_equals_the_reference(kernels, o.change(lambda v: v.transpose(0, 2), "x", "grad_output"))


@every_form
@pytest.mark.parametrize("at_end", [True, False])
@pytest.mark.parametrize("shape", [(1, 1, 1), (13, 37, 31), (17, 24, 72), (3, 60, 9), (66, 129, 130)], ids=str)
def test_nothing_outside_the_operands_is_touched(kernels, shape, at_end):
    """Operands end or begin at a forbidden page, and results too if the backend allows it."""
    if kernels.device.type != "cpu" or (kernels.interpreted and shape[0] > 20):
        pytest.skip("the pages are those of the CPU's memory, and the interpreter takes seconds for many tokens")
    dtype = kernels.dtypes[shape[0] % len(kernels.dtypes)]
    t = integer_inputs(*shape, dtype, FP32 if dtype == BF16 else BF16)
    o = Operands.of(t, row_thresholds(t)).change(lambda v: guarded(v, at_end=at_end))
    expected = dict(every_product(oracle, o))
    for by in kernels.ways():
        with kernels.guarded_outputs(at_end=at_end):
            for name, got in every_product(by, o, gradients=by.has_gradients):
                assert_same(got, expected[name], name)


@every_form
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_behind_the_rows_and_in_other_tokens_reaches_no_result(kernels, dtype):
    """Not even if a backend uses torch's own product, with its errors on AMX."""
    kernels.need(dtype)
    operands = [name for name in TENSORS if name != "threshold" and (kernels.any_strides or name in MATRICES)]
    few = (33,) if kernels.name in ("triton", "cuda") else (5, 31, 33, 45, 60)  # others take seconds
    with amx_gemm():
        for by in kernels.ways():
            for length in few:
                o = integers(length, length, length, dtype=dtype, device=kernels.device)
                assert_no_pitch_is_read(by, o, *operands, gradients=by.has_gradients)
                assert_rows_are_independent(by, o)


# -------------------------------------------------------------------------------------------------------------- values


@infinite
@every_form_and_hopper
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dropped_weights_contribute_zero_whatever_they_are(kernels, dtype):
    kernels.need(dtype)
    t = integer_inputs(9, 24, kernels.columns, dtype, dtype)
    wild = torch.tensor([torch.nan, torch.inf, -torch.inf]).to(dtype)
    t.scores[t.scores == 0] = 1  # with a score of 0, a NaN gradient may become NaN or 0
    t.weight = torch.where(t.scores.abs() >= 2, t.weight, wild[torch.arange(t.weight.numel()).view_as(t.weight) % 3])
    o = Operands.of(t, 2.0).to(kernels.device)
    assert_every_way_equals_the_reference(kernels, o)
    nothing = Operands.of(replace(t, bias=torch.zeros_like(t.bias)), 9.0).to(kernels.device)
    for by in kernels.ways():
        for name, got in every_product(by, o, gradients=False):
            assert got.isfinite().all(), name
        for name, got in every_product(by, nothing, gradients=False):  # with nothing kept: +0, not -0
            assert not got.any(), name
            assert not got.signbit().any(), name


@infinite
@every_form
@pytest.mark.parametrize("tokens", [3, 20])
def test_what_is_not_finite_stays_with_its_token_and_its_weight(kernels, tokens):
    """A kept infinity must not meet padding either: times its zeros it would be NaN."""
    dtype = kernels.dtypes[tokens % len(kernels.dtypes)]
    t = integer_inputs(tokens, 37, 59, dtype, FP32)
    t.x, t.grad_output = t.x.abs() + 1, t.grad_output.abs() + 1
    t.x[1, 7], t.x[2], t.grad_output[1, 36], t.grad_output[2] = torch.nan, torch.inf, torch.inf, torch.nan
    t.weight[-1, -1], t.scores[-1, -1] = torch.inf, 3
    t.weight[5, 11], t.scores[5, 11] = -torch.inf, 3
    assert_every_way_equals_the_reference(kernels, Operands.of(t, 2.0).to(kernels.device), gradients=False)


@infinite
@every_form_and_hopper
@pytest.mark.parametrize("scores_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_every_score_meets_every_threshold(kernels, mode, scores_dtype):
    """NaN, infinities, zeros, the smallest and the largest numbers. A NaN score is dropped and has no sign."""
    info = torch.finfo(scores_dtype)
    tiny = info.smallest_normal * info.eps  # the smallest number above zero
    if INTERPRETING and scores_dtype == BF16:
        tiny = info.smallest_normal  # Triton's interpreter reads smaller numbers wrongly
    special = [torch.nan, -torch.nan, torch.inf, -torch.inf, 0.0, -0.0, tiny, -tiny, 3 * tiny, info.max, info.min, 1.0]
    values = torch.tensor(special, dtype=torch.float64).to(scores_dtype)
    t = integer_inputs(8, 24, kernels.columns, FP16, scores_dtype)
    t.scores = torch.stack([values.roll(i).repeat(11)[: kernels.columns] for i in range(24)])
    assert_every_way_equals_the_reference(kernels, Operands.of(t, values.repeat(2), mode).to(kernels.device))
    assert_every_way_equals_the_reference(kernels, Operands.of(t, values[7], mode).to(kernels.device), gradients=False)


@every_form
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kept_weights_go_through_in_every_bit(kernels, dtype):
    """The product with the identity is the masked weight itself."""
    kernels.need(dtype)
    t = random_inputs(48, 48, 48, dtype, BF16)
    t.x = t.grad_output = torch.eye(48, dtype=dtype)
    t.bias = torch.zeros_like(t.bias)
    o = Operands.of(t, reference.kept_threshold(t.scores, 0.5, "magnitude")).to(kernels.device)
    assert_every_way_equals_the_reference(kernels, o, gradients=False)


@every_form_and_hopper
@pytest.mark.parametrize("dtype", DTYPES, ids=str)  # fp32 without TF32, which is PyTorch's default
def test_random_errors_stay_within_twice_those_of_pytorch(kernels, dtype):
    kernels.need(dtype)
    t = random_inputs(17, 40, kernels.columns + 96, dtype, dtype)
    o = Operands.of(t, reference.kept_threshold(t.scores, 0.7, "magnitude"))
    pytorchs, exact = dict(every_product(oracle, o)), dict(every_product(oracle, o.exact()))
    for by in kernels.ways():
        for name, got in every_product(by, o.to(kernels.device), gradients=by.has_gradients):
            assert_within_budget(got.cpu(), pytorchs[name], exact[name].double())


@infinite
@every_form
def test_a_sum_and_its_bias_are_rounded_once(kernels):
    """In fp16, 65,504 is the largest finite number; a bias brings a larger sum back below it."""
    t = integer_inputs(1, 2, 8, FP16, FP16)
    t.x, t.weight, t.bias = torch.full((1, 8), 128.0), torch.full((2, 8), 64.0), torch.tensor([0.0, -1024.0])
    o = Operands.of(t, -torch.inf, "value").change(torch.Tensor.half, "x", "weight", "bias").to(kernels.device)
    for by in kernels.ways():
        y = by.masked_linear(o.x, o.weight, o.scores, o.threshold, o.bias, o.mode)
        assert y.tolist() == [[torch.inf, 64512.0]], by.name


@every_form
def test_repeated_calls_give_the_same_bits(kernels):
    t = random_inputs(5, 24, 72, kernels.dtypes[-1], BF16)
    o = Operands.of(t, 0.02).to(kernels.device)
    first = dict(every_product(kernels, o))
    for seed in range({"triton": 1, "cuda": 3}.get(kernels.name, 10)):
        kernels.disturb(seed)
        for name, again in every_product(kernels, o):
            assert torch.equal(again, first[name]), name


# ------------------------------------------------------------------------------------------------------------ anything


@every_form_and_card
def test_any_arguments_equal_the_reference(kernels):
    hypothesis = pytest.importorskip("hypothesis")
    st = hypothesis.strategies
    sizes = st.integers(1, 60)

    @hypothesis.given(
        shape=st.tuples(st.integers(0, 60), sizes, sizes),
        dtype=st.sampled_from(kernels.dtypes),
        scores_dtype=st.sampled_from(DTYPES),
        mode=st.sampled_from(MODES),
        threshold=st.sampled_from((-torch.inf, -1.0, 0.0, 2.0, 2.5, torch.inf, torch.nan)),
        by_row=st.booleans(),
        layouts=st.tuples(*[st.sampled_from((*BY_ROWS, *(BY_COLUMNS if kernels.any_strides else ())))] * 4),
        expanded=st.sampled_from((None, *MATRICES)),
        output_mask=st.lists(st.booleans(), min_size=4, max_size=4),
        packed=st.booleans(),
        has_bias=st.booleans(),
    )
    @hypothesis.settings(max_examples=8 if kernels.name in ("triton", "cuda") else 30, deadline=None)
    def check(shape, dtype, scores_dtype, mode, threshold, by_row, layouts, expanded, output_mask, packed, has_bias):
        t = integer_inputs(*shape, dtype, scores_dtype, seed=sum(shape))
        thresholds = torch.full((), threshold, dtype=scores_dtype)
        o = Operands.of(t, thresholds + row_thresholds(t) if by_row else thresholds, mode).to(kernels.device)
        for name, layout in zip(MATRICES, layouts):
            o = o.change(layout, name)
        if expanded and len(getattr(o, expanded)):
            o = o.change(lambda v: v[:1].expand(v.shape), expanded)
        on_cpu = o.to(torch.device("cpu"))
        expected = _forward_and_backward(oracle, on_cpu, packed, has_bias, output_mask)
        for by in kernels.ways():
            results = _forward_and_backward(by, o, packed, has_bias, output_mask)
            for got, right in zip(results, expected, strict=True):
                assert_same(got, right, by.name)

    check()


def _forward_and_backward(by, o, packed, has_bias, output_mask):
    bias = o.bias if has_bias else None
    given = (o.grad_output, o.x, o.weight)
    if packed:
        y = by.masked_linear_packed(o.x, o.weight, o.packed, bias)
        return y, *by.masked_linear_packed_backward(*given, o.packed, None, o.signs, o.mode, output_mask)
    y = by.masked_linear(o.x, o.weight, o.scores, o.threshold, bias, o.mode)
    return y, *by.masked_linear_backward(*given, o.scores, o.threshold, o.mode, output_mask)
