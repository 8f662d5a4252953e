"""The ops over experts: each expert equals the ops of a single matrix, whatever its number of rows, in both layouts."""

import pytest
import torch
from experts import integer_experts, one_by_one
from torch.library import opcheck

import mft_kernels
from mft_kernels import reference
from mft_kernels.backends.table import registered
from mft_kernels.operands import Experts
from mft_kernels.testing import assert_within_budget

MODES = ("magnitude", "value")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAMES = ("x", "weight", "scores", "bias")
LAYOUTS = pytest.mark.parametrize("transposed", [False, True], ids=["(E, N, K)", "(E, K, N)"])


@pytest.fixture
def backend(backend):
    if Experts not in registered(backend).takes:
        pytest.skip(f"{backend} has no products over experts")
    return backend


def _leaves(t):
    return [getattr(t, name).detach().clone().requires_grad_() for name in NAMES]


@LAYOUTS
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(45, 37), (16, 32), (60, 60)], ids=str)
def test_values_and_gradients_are_those_of_each_expert_alone(sizes, dtype, mode, transposed, backend):
    t = integer_experts(*sizes, dtype, transposed=transposed)
    ours, theirs = _leaves(t), _leaves(t)
    x, weight, scores, bias = ours
    y = mft_kernels.masked_linear_grouped(
        x, weight, scores, t.threshold, t.offsets, bias, transposed=transposed, mode=mode, backend=backend
    )
    expected = one_by_one(t, *theirs, mode)
    assert torch.equal(y, expected)
    y.backward(t.grad_output)
    expected.backward(t.grad_output)
    for name, a, b in zip(NAMES, ours, theirs):
        assert torch.equal(a.grad, b.grad), name


@LAYOUTS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_masks_give_the_same(dtype, transposed, backend):
    t = integer_experts(45, 37, dtype, transposed=transposed)
    packed = mft_kernels.pack_mask(t.scores, t.threshold, backend=backend)
    keep = torch.stack([reference.keep_mask(s, c, "magnitude") for s, c in zip(t.scores, t.threshold)])
    assert torch.equal(mft_kernels.unpack_mask(packed, t.weight.shape), keep)
    leaves = _leaves(t)
    y = mft_kernels.masked_linear_grouped_packed(
        leaves[0], leaves[1], packed, t.offsets, leaves[3], transposed=transposed, backend=backend
    )
    theirs = _leaves(t)
    expected = one_by_one(t, *theirs, "magnitude")
    assert torch.equal(y, expected)
    y.backward(t.grad_output)
    expected.backward(t.grad_output)
    for i in (0, 1, 3):
        assert torch.equal(leaves[i].grad, theirs[i].grad), NAMES[i]


@LAYOUTS
@pytest.mark.parametrize("sign", ["scores", "signs", None])
@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_add_up_and_experts_without_rows_are_left_alone(dtype, out_dtype, sign, transposed, backend):
    t = integer_experts(45, 37, dtype, transposed=transposed)
    scores = t.scores.masked_fill(t.scores == 0, 1)
    signs = reference.pack_signs(scores.flatten(0, 1))[0].view(*scores.shape[:2], -1)
    given = {"scores": {"scores": scores}, "signs": {"signs": signs}, None: {}}[sign]
    weight = t.weight if sign else None
    out = torch.full(t.weight.shape, 3.0, dtype=out_dtype)
    version = out._version
    mft_kernels.accumulate_score_grad_grouped(
        out, t.grad_output, t.x, t.offsets, weight, transposed=transposed, backend=backend, **given
    )
    assert out._version > version
    for e, rows in enumerate(t.groups()):
        left, right = (t.x, t.grad_output) if transposed else (t.grad_output, t.x)
        expected = left[rows].float().T @ right[rows].float()
        if sign:
            expected = expected * t.weight[e].float() * scores[e].sign().float()
        assert torch.equal(out[e], (3 + expected).to(out_dtype)), e


@LAYOUTS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_random_errors_stay_within_twice_those_of_pytorch(dtype, transposed, backend):
    generator = torch.Generator().manual_seed(0)
    rows, n, k = (5, 0, 70, 20), 48, 96
    shape = (4, k, n) if transposed else (4, n, k)
    x, g = torch.randn(95, k, generator=generator).to(dtype), torch.randn(95, n, generator=generator).to(dtype)
    weight, bias = (torch.randn(s, generator=generator).mul(0.02).to(dtype) for s in (shape, (4, n)))
    scores = torch.randn(shape, generator=generator) * 0.02
    offsets = torch.tensor(rows).cumsum(0).int()
    threshold = mft_kernels.kept_thresholds(scores, 0.9, backend=backend)

    def run(cast, backend):
        wide = torch.float64 if cast == torch.float64 else torch.float32
        leaves = [v.to(cast).requires_grad_() for v in (x, weight)]
        s = scores.to(wide, copy=True).requires_grad_()
        y = mft_kernels.masked_linear_grouped(
            *leaves, s, threshold.to(wide), offsets, bias.to(cast), transposed=transposed, backend=backend
        )
        y.backward(g.to(cast))
        return y.detach(), leaves[0].grad, s.grad

    exact, plain, ours = run(torch.float64, "reference"), run(dtype, "reference"), run(dtype, backend)
    for got, same_dtype, truth in zip(ours, plain, exact):
        assert_within_budget(got, same_dtype, truth)
    for got, again in zip(ours, run(dtype, backend)):
        assert torch.equal(got, again)


@pytest.mark.parametrize("scores_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("keep_ratio", [0.0, 0.1, 0.9, 1.0])
def test_each_expert_has_its_own_threshold(keep_ratio, scores_dtype, backend):
    scores = torch.randn(5, 33, 70, generator=torch.Generator().manual_seed(0)).to(scores_dtype)
    scores[2] = scores[2].abs() + 1
    for mode in MODES:
        found = mft_kernels.kept_thresholds(scores, keep_ratio, mode=mode, backend=backend)
        assert torch.equal(found, torch.stack([reference.kept_threshold(s, keep_ratio, mode) for s in scores]))
        packed = mft_kernels.pack_mask(scores, found, mode=mode, backend=backend)
        assert torch.equal(packed, torch.stack([reference.pack_mask(s, t, mode) for s, t in zip(scores, found)]))


@LAYOUTS
def test_what_is_dropped_and_what_has_no_rows_may_be_nan(transposed, backend):
    t = integer_experts(45, 37, transposed=transposed)
    scores, weight = t.scores, t.weight.clone()
    dropped = ~torch.stack([reference.keep_mask(s, c, "magnitude") for s, c in zip(scores, t.threshold)])
    clean = mft_kernels.masked_linear_grouped(
        t.x, weight, scores, t.threshold, t.offsets, transposed=transposed, backend=backend
    )
    weight[dropped] = torch.nan
    weight[0] = weight[3] = torch.inf
    packed = mft_kernels.pack_mask(scores, t.threshold)
    options = {"transposed": transposed, "backend": backend}
    assert torch.equal(clean, mft_kernels.masked_linear_grouped_packed(t.x, weight, packed, t.offsets, **options))
    leaf = scores.clone().requires_grad_()
    y = mft_kernels.masked_linear_grouped(t.x, weight, leaf, t.threshold, t.offsets, **options)
    assert torch.equal(clean, y)
    y.backward(t.grad_output)
    assert leaf.grad[[0, 3, 6]].eq(0).all()


@LAYOUTS
def test_of_scores_that_nothing_is_remembered_of_the_mask_is_found_in_both_passes(transposed):
    t = integer_experts(45, 37, transposed=transposed)
    found, expected = [], []
    for grads, by_ratio in ((found, True), (expected, False)):
        x, weight, scores, bias = _leaves(t)
        if by_ratio:
            y = mft_kernels.masked_linear_grouped_by_ratio(
                x, weight, scores, t.offsets, bias, keep_ratio=0.6, transposed=transposed
            )
        else:
            threshold = mft_kernels.kept_thresholds(scores, 0.6)
            y = mft_kernels.masked_linear_grouped(x, weight, scores, threshold, t.offsets, bias, transposed=transposed)
        y.backward(t.grad_output)
        grads += [y, x.grad, weight.grad, scores.grad, bias.grad]
    for one, other in zip(found, expected):
        assert torch.equal(one, other)


def test_no_rows_at_all(backend):
    t = integer_experts(16, 32, rows=(0, 0), nobodys=0)
    leaves = _leaves(t)
    x, weight, scores, bias = leaves
    y = mft_kernels.masked_linear_grouped(x, weight, scores, t.threshold, t.offsets, bias, backend=backend)
    y.sum().backward()
    assert y.shape == (0, 16)
    for leaf in leaves:
        assert leaf.grad.eq(0).all()


def test_strided_inputs_equal_their_contiguous_copies(backend):
    t = integer_experts(45, 37)
    packed = mft_kernels.pack_mask(t.scores, t.threshold)
    clean = mft_kernels.masked_linear_grouped_packed(t.x, t.weight, packed, t.offsets, t.bias, backend=backend)
    x = t.x.T.contiguous().T
    weight = t.weight.transpose(1, 2).contiguous().transpose(1, 2)
    bits = packed.repeat_interleave(2, 0)[::2]
    y = mft_kernels.masked_linear_grouped_packed(x, weight, bits, t.offsets, t.bias.T.contiguous().T, backend=backend)
    assert torch.equal(y, clean)


@LAYOUTS
def test_opcheck(transposed):
    t = integer_experts(16, 32, transposed=transposed)
    x, weight, scores, bias = _leaves(t)
    packed = mft_kernels.pack_mask(t.scores, t.threshold)
    ops = torch.ops.mft
    tail = (transposed, "magnitude", "auto")
    opcheck(ops.masked_linear_grouped, (x, weight, scores, t.threshold, t.offsets, bias, *tail))
    opcheck(ops.masked_linear_grouped_packed, (x, weight, packed, t.offsets, bias, transposed, "auto"))
    opcheck(ops.masked_linear_grouped_by_ratio, (x, weight, scores, t.offsets, bias, 0.9, None, *tail))
    out, grad = torch.zeros(t.weight.shape), t.grad_output
    opcheck(ops.accumulate_score_grad_grouped, (out, grad, t.x, t.offsets, None, None, None, *tail))
    opcheck(ops.kept_thresholds, (t.scores, 0.9, "magnitude", "auto"))


def test_compiled_whole_with_counts_that_change():
    t = integer_experts(16, 32)
    layer = mft_kernels.MaskedGroupedLinear(t.weight, t.bias, keep_ratio=0.7)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for rows in ((0, 1, 7, 0, 33, 16, 0), (57, 0, 0, 0, 0, 0, 0), (1, 2, 3, 4, 5, 6, 36)):
        offsets = torch.tensor(rows).cumsum(0).int()
        x = t.x.clone().requires_grad_()
        compiled(x, offsets).sum().backward()
        found, scores = x.grad, layer.scores.grad
        x.grad = layer.scores.grad = None
        layer(x, offsets).sum().backward()
        assert torch.equal(found, x.grad)
        assert torch.equal(scores, layer.scores.grad)
        layer.scores.grad = None


def test_autocast_casts_all_but_the_scores():
    t = integer_experts(16, 32)
    scores = t.scores.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = mft_kernels.masked_linear_grouped(t.x, t.weight, scores, t.threshold, t.offsets, t.bias)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert scores.grad.dtype == torch.float32


def test_a_second_derivative_is_an_error():
    t = integer_experts(16, 32)
    x, weight, scores, bias = _leaves(t)
    y = mft_kernels.masked_linear_grouped(x, weight, scores, t.threshold, t.offsets, bias)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        torch.autograd.grad(y.sum(), x, create_graph=True)[0].sum().backward()
