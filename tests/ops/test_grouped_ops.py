"""The public ops over experts: each expert equals the ops of a single matrix, in both layouts, with gradients.

test_expert_products.py tests what their kernels must do.
"""

import pytest
import torch
from experts import ROWS, integer_experts, one_by_one
from products import DTYPES
from torch.library import opcheck

import mft_kernels
from mft_kernels import reference
from mft_kernels.backends.table import registered
from mft_kernels.operands import Experts

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
@pytest.mark.parametrize("by", ["magnitude", "value", "packed"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("sizes", "rows"),
    [((45, 37), ROWS), ((16, 32), ROWS), ((60, 60), ROWS), ((16, 32), (0, 0))],
    ids=["45 x 37", "16 x 32", "60 x 60", "no rows"],
)
def test_values_and_gradients_are_those_of_each_expert_alone(sizes, rows, dtype, by, transposed, backend):
    t = integer_experts(*sizes, dtype, rows=rows, transposed=transposed)
    ours, theirs, names = _leaves(t), _leaves(t), NAMES
    x, weight, scores, bias = ours
    options = {"transposed": transposed, "backend": backend}
    if by == "packed":
        names = ("x", "weight", "bias")
        packed = mft_kernels.pack_mask(t.scores, t.threshold, backend=backend)
        keep = torch.stack([reference.keep_mask(s, c, "magnitude") for s, c in zip(t.scores, t.threshold)])
        assert torch.equal(mft_kernels.unpack_mask(packed, t.weight.shape), keep)
        y = mft_kernels.masked_linear_grouped_packed(x, weight, packed, t.offsets, bias, **options)
    else:
        y = mft_kernels.masked_linear_grouped(x, weight, scores, t.threshold, t.offsets, bias, mode=by, **options)
    expected = one_by_one(t, *theirs, "magnitude" if by == "packed" else by)
    assert torch.equal(y, expected)
    y.backward(t.grad_output)
    expected.backward(t.grad_output)
    for name, a, b in zip(NAMES, ours, theirs):
        assert name not in names or torch.equal(a.grad, b.grad), name


@LAYOUTS
@pytest.mark.parametrize("sign", ["scores", "signs", None])
def test_gradients_add_up_and_show_in_the_version_of_their_buffer(sign, transposed, backend):
    t = integer_experts(45, 37, transposed=transposed)
    scores = t.scores.masked_fill(t.scores == 0, 1)
    signs = reference.pack_signs(scores.flatten(0, 1))[0].view(*scores.shape[:2], -1)
    given = {"scores": {"scores": scores}, "signs": {"signs": signs}, None: {}}[sign]
    out = torch.full(t.weight.shape, 3.0)
    version, given = out._version, given | {"weight": t.weight if sign else None}
    mft_kernels.accumulate_score_grad_grouped(
        out, t.grad_output, t.x, t.offsets, transposed=transposed, backend=backend, **given
    )
    assert out._version > version
    left, right = t.factors
    for e, rows in enumerate(t.groups()):
        expected = left[rows].T @ right[rows] * (t.weight[e] * scores[e].sign() if sign else 1)
        assert torch.equal(out[e], 3 + expected), e


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
