"""Check the reference against definitions that share no code with it; test_ops.py has its values and gradients."""

import contextlib
import itertools

import pytest
import torch
from amx_gemm import amx_gemm
from by_name import oracle
from products import ALL, MODES, TENSORS, assert_no_pitch_is_read, assert_rows_are_independent, integers

from mft_kernels import reference
from mft_kernels.testing import integer_inputs

OPERANDS = tuple(name for name in TENSORS if name != "threshold")


def test_a_dropped_nan_or_inf_weight_contributes_an_exact_zero():
    weight = torch.tensor([[torch.nan, 2.0, torch.inf]])
    scores = torch.tensor([[0.1, 1.0, -0.2]])
    y = oracle.masked_linear(torch.full((1, 3), 3.0), weight, scores, torch.tensor(0.5), None, "magnitude")
    assert y.item() == 6


def test_kept_threshold_is_the_kth_of_a_sort():
    hypothesis = pytest.importorskip("hypothesis")
    st = hypothesis.strategies

    @hypothesis.given(st.integers(1, 200), st.floats(0, 1), st.integers(0, 99), st.sampled_from(MODES))
    @hypothesis.settings(max_examples=60, deadline=None)
    def check(numel, keep_ratio, seed, mode):
        scores = torch.randint(-20, 21, (numel,), generator=torch.Generator().manual_seed(seed)).float()
        k = numel - int((1 - keep_ratio) * numel)
        keys = scores.abs() if mode == "magnitude" else scores
        expected = keys.sort(descending=True).values[k - 1].item() if k else torch.inf
        assert reference.kept_threshold(scores, keep_ratio, mode).item() == expected

    check()


def test_packing_and_unpacking_gives_the_mask_back():
    for rows, columns in itertools.product((0, 1, 5), range(1, 101)):
        bits = torch.rand(rows, columns, generator=torch.Generator().manual_seed(rows)) < 0.5
        packed = reference.pack_bits(bits)
        assert packed.dtype == torch.int32
        assert packed.shape == (rows, -(-columns // 32))
        assert torch.equal(reference.unpack_mask(packed, [rows, columns]), bits)


def test_bit_j_of_a_word_is_column_j():
    bits = torch.zeros(1, 40, dtype=torch.bool)
    bits[0, [0, 5, 31, 33]] = True
    assert reference.pack_bits(bits).tolist() == [[1 + (1 << 5) - (1 << 31), 2]]


def test_pack_signs_counts_scores_that_have_no_sign():
    signs, zeros = reference.pack_signs(torch.tensor([[0.0, -0.0, 1.0, -1.0]]))
    assert signs.tolist() == [[4]]
    assert zeros.item() == 2


@pytest.mark.parametrize("mode", MODES)
def test_the_packed_form_agrees_with_the_form_from_scores(mode):
    t = integer_inputs(9, 6, 40)
    t.scores[t.scores == 0] = 1  # a score of 0 has no sign bit
    threshold = torch.tensor(2.0)
    packed = reference.pack_mask(t.scores, threshold, mode)
    signs, _ = reference.pack_signs(t.scores)
    assert torch.equal(
        oracle.masked_linear_packed(t.x, t.weight, packed, t.bias),
        oracle.masked_linear(t.x, t.weight, t.scores, threshold, t.bias, mode),
    )
    expected = oracle.masked_linear_backward(t.grad_output, t.x, t.weight, t.scores, threshold, mode, ALL)
    for given_scores, given_signs in ((t.scores, None), (None, signs), (t.scores, signs)):
        if mode == "value" and given_scores is None:
            continue
        got = oracle.masked_linear_packed_backward(
            t.grad_output, t.x, t.weight, packed, given_scores, given_signs, mode, ALL
        )
        for a, b in zip(got, expected):
            assert torch.equal(a, b)


@pytest.mark.parametrize(("n", "k"), [(0, 3), (4, 0), (0, 0)])
def test_a_layer_without_inputs_or_outputs_has_a_value_and_gradients(n, k):
    x, weight, bias = torch.ones(2, 5, k), torch.ones(n, k), torch.ones(n)
    y = oracle.masked_linear(x, weight, weight, torch.tensor(1.0), bias, "magnitude")
    assert torch.equal(y, bias.expand(2, 5, n) + k)
    grads = oracle.masked_linear_backward(y, x, weight, weight, torch.tensor(1.0), "magnitude", [True] * 4)
    assert [g.shape for g in grads] == [x.shape, weight.shape, weight.shape, bias.shape]


# ------------------------------------------------------------------------------------------------ on every processor


@pytest.mark.parametrize("operand", OPERANDS)
@pytest.mark.parametrize("gemm", [contextlib.nullcontext, amx_gemm], ids=["this processor's", "of AMX"])
def test_nothing_behind_the_rows_of_an_operand_is_multiplied(gemm, operand):
    with gemm():
        for length in (*range(1, 9), *range(33, 61, 3)):
            assert_no_pitch_is_read(oracle, integers(length, length, length, dtype=torch.bfloat16), operand)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("gemm", [contextlib.nullcontext, amx_gemm], ids=["this processor's", "of AMX"])
def test_all_rows_may_have_a_pitch_and_a_token_of_nan_stays_in_its_row(gemm, dtype):
    with gemm():
        for length in (*range(1, 9), *range(15, 61, 5), 32, 33, 48, 49):
            o = integers(length, length, length, dtype=dtype)
            assert_no_pitch_is_read(oracle, o, *OPERANDS)
            assert_rows_are_independent(oracle, o)


@pytest.mark.parametrize("length", [40, 70])
def test_the_gemm_of_amx_that_tests_stand_in_reads_behind_rows(length):
    x = torch.ones(4, length + 3, dtype=torch.bfloat16)
    x[2, length:] = x[3] = torch.nan
    weight = torch.ones(6, length, dtype=torch.bfloat16)
    with amx_gemm():
        y = torch.nn.functional.linear(x[:, :length], weight)
        dense = torch.nn.functional.linear(x[:, :length].contiguous(), weight)
    assert y.isnan().any(1).tolist() == [False, False, True, True]  # reads its own pitch
    assert dense.isnan().any(1).tolist() == [False, False, True, True]  # reads the next row
