"""Each op through its public function: value and gradient, opcheck, fullgraph compile, autocast, and what it refuses.

tests/ops tests what its kernels must do.
"""

import pytest
import torch
from by_name import oracle
from products import DTYPES, MODES
from torch.library import opcheck

import mft_kernels
from mft_kernels import reference
from mft_kernels.testing import integer_inputs, random_inputs


def detached_masked_linear(x, weight, scores, threshold, bias=None, *, mode="magnitude"):
    """Compute a masked linear layer in plain autograd, as x @ (weight * (mask + key - key.detach())).T + bias.

    key is |scores| or scores. The value is the masked product and the gradients are the straight-through ones, without
    any code of ours. It multiplies where we select, so weights must be finite. Its d_weight is grad.T @ x masked, like
    ours.
    """
    key = scores.abs() if mode == "magnitude" else scores
    mask = (key >= threshold).to(weight.dtype)
    straight_through = mask + (key - key.detach()).to(weight.dtype)
    return torch.nn.functional.linear(x, weight * straight_through, bias)


def _leaves(t, *names):
    return [getattr(t, name).detach().clone().requires_grad_() for name in names]


# ------------------------------------------------------------------------------------------------ values and gradients


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masked_linear_equals_the_detach_formulation_on_integers(mode, dtype, backend):
    t = integer_inputs(33, 17, 45, dtype)
    threshold = torch.tensor(2.0)
    ours, theirs = _leaves(t, "x", "weight", "scores", "bias"), _leaves(t, "x", "weight", "scores", "bias")
    y = mft_kernels.masked_linear(*ours[:3], threshold, ours[3], mode=mode, backend=backend)
    expected = detached_masked_linear(*theirs[:3], threshold, theirs[3], mode=mode)
    assert torch.equal(y, expected)
    y.backward(t.grad_output)
    expected.backward(t.grad_output)
    for name, a, b in zip(("x", "weight", "scores", "bias"), ours, theirs):
        assert torch.equal(a.grad, b.grad), name


@pytest.mark.parametrize("mode", MODES)
def test_a_threshold_may_be_given_for_each_row(mode, backend):
    t = integer_inputs(6, 5, 37)
    thresholds = torch.tensor([0.0, 1, 2, 3, 4])
    x, scores = _leaves(t, "x", "scores")
    y = mft_kernels.masked_linear(x, t.weight, scores, thresholds, t.bias, mode=mode, backend=backend)
    y.backward(t.grad_output)
    for row, threshold in enumerate(thresholds):
        alone = slice(row, row + 1)
        expected = oracle.masked_linear(t.x, t.weight[alone], t.scores[alone], threshold, t.bias[alone], mode)
        assert torch.equal(y[:, alone], expected)
    want = [True, False, True, False]
    expected = oracle.masked_linear_backward(t.grad_output, t.x, t.weight, t.scores, thresholds, mode, want)
    assert torch.equal(x.grad, expected[0])
    assert torch.equal(scores.grad, expected[2])
    packed = mft_kernels.pack_mask(t.scores, thresholds, mode=mode, backend=backend)
    assert torch.equal(mft_kernels.unpack_mask(packed, (5, 37)), reference.keep_mask(t.scores, thresholds, mode))


def many_masks():
    """Return x (6, 3, K), weight, three masks, a task for each row, bias and grad_output."""
    t = integer_inputs(18, 17, 45)
    masks = [reference.pack_bits(t.scores.roll(shift) > 0) for shift in range(3)]
    return t.x.view(6, 3, 45), t.weight, masks, torch.tensor([2, -1, 0, 2, 1, 0]), t.bias, t.grad_output.view(6, 3, 17)


def test_each_row_takes_its_own_of_many_masks(backend):
    x, weight, masks, tasks, bias, grad = many_masks()
    x.requires_grad_()
    y = mft_kernels.masked_linear_many(x, weight, masks, tasks, bias, backend=backend)
    y.backward(grad)
    every = [*masks, torch.full_like(masks[0], -1)]
    for row, task in enumerate(tasks):
        alone = x[row].detach().requires_grad_()
        expected = mft_kernels.masked_linear_packed(alone, weight, every[task], bias, backend="reference")
        expected.backward(grad[row])
        assert torch.equal(y[row], expected)
        assert torch.equal(x.grad[row], alone.grad)
    stacked = mft_kernels.masked_linear_many(x, weight, torch.stack(masks), tasks.int(), bias, backend=backend)
    assert torch.equal(stacked, y)


def test_gradcheck_of_the_smooth_arguments():
    t = random_inputs(3, 4, 5, torch.float64, torch.float64)
    threshold = reference.kept_threshold(t.scores, 0.6, "magnitude")
    packed = mft_kernels.pack_mask(t.scores, threshold)
    x, weight, bias = _leaves(t, "x", "weight", "bias")
    assert torch.autograd.gradcheck(
        lambda x, w, b: mft_kernels.masked_linear(x, w, t.scores, threshold, b), (x, weight, bias)
    )
    assert torch.autograd.gradcheck(
        lambda x, w, b: mft_kernels.masked_linear_packed(x, w, packed, b), (x, weight, bias)
    )


def test_nothing_is_saved_or_computed_for_arguments_without_gradient():
    t = random_inputs(3, 4, 5)
    x = t.x.requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda v: saved.append(v) or v, lambda v: v):
        y = mft_kernels.masked_linear(x, t.weight, t.scores, torch.tensor(0.01))
    assert all(v.data_ptr() != x.data_ptr() for v in saved)
    y.sum().backward()
    assert t.weight.grad is None
    assert t.scores.grad is None


@pytest.mark.parametrize("with_weight", [True, False])
def test_accumulation_shows_in_the_version_of_its_buffer(with_weight, backend):
    t = integer_inputs(6, 5, 37)
    out = torch.zeros(5, 37)
    factors = {"weight": t.weight, "scores": t.scores} if with_weight else {"weight": None}
    version = out._version
    mft_kernels.accumulate_score_grad(out, t.grad_output, t.x, **factors, backend=backend)
    assert out._version > version
    with torch.inference_mode():
        mft_kernels.accumulate_score_grad(torch.zeros(5, 37), t.grad_output, t.x, **factors, backend=backend)


# ------------------------------------------------------------------------------------------------ PyTorch's machinery


def test_opcheck_of_every_op_without_a_mode(backend):
    t = integer_inputs(6, 5, 37)
    x, weight, scores, bias = _leaves(t, "x", "weight", "scores", "bias")
    packed = mft_kernels.pack_mask(scores, torch.tensor(2.0))
    mft = torch.ops.mft
    opcheck(mft.masked_linear_packed.default, (x, weight, packed, bias, backend))
    many = many_masks()
    opcheck(mft.masked_linear_many.default, (many[0].requires_grad_(), *many[1:5], backend))
    opcheck(mft.masked_linear_many_backward.default, (many[5], *many[1:4], backend))
    opcheck(mft.pack_signs.default, (scores.detach(), backend))
    opcheck(mft.unpack_mask.default, (packed, [5, 37]))


def test_opcheck_of_every_op_with_a_mode(backend):
    mode = MODES[backend == "cpu"]  # each backend in one mode: a schema knows neither
    t = integer_inputs(6, 5, 37)
    t.scores[t.scores == 0] = 1
    x, weight, scores, bias = _leaves(t, "x", "weight", "scores", "bias")
    detached = scores.detach()
    threshold = torch.tensor(2.0)
    packed = mft_kernels.pack_mask(scores, threshold, mode=mode)
    signs = reference.pack_signs(detached)[0]
    mft = torch.ops.mft
    want = [True, True, True, True]
    opcheck(mft.masked_linear.default, (x, weight, scores, threshold, bias, mode, backend))
    opcheck(mft.masked_linear_by_ratio.default, (x, weight, scores, bias, 0.9, None, mode, "matrix", backend))
    opcheck(mft.kept_threshold.default, (detached, 0.9, mode, backend))
    opcheck(mft.pack_mask.default, (detached, threshold, mode, backend))
    x, weight, bias = x.detach(), weight.detach(), bias.detach()
    out = torch.zeros(5, 37)
    opcheck(mft.accumulate_score_grad.default, (out, t.grad_output, x, weight, detached, None, mode, backend))
    opcheck(mft.accumulate_score_grad.default, (out, t.grad_output, x, None, None, None, mode, backend))
    opcheck(mft.masked_linear_backward.default, (t.grad_output, x, weight, detached, threshold, mode, want, backend))
    opcheck(
        mft.masked_linear_packed_backward.default,
        (t.grad_output, x, weight, packed, detached, signs, mode, want, backend),
    )
    opcheck(
        mft.masked_linear_by_ratio_backward.default,
        (t.grad_output, x, weight, detached, 0.9, None, mode, "matrix", want, backend),
    )


def test_every_op_compiles_without_a_graph_break():
    t = integer_inputs(6, 5, 37)

    def everything(x, weight, scores, bias):
        threshold = mft_kernels.kept_threshold(scores, 0.7)
        packed = mft_kernels.pack_mask(scores, threshold)
        mask = mft_kernels.unpack_mask(packed, weight.shape)
        a = mft_kernels.masked_linear(x, weight, scores, threshold, bias)
        b = mft_kernels.masked_linear_packed(x, weight, packed, bias)
        every = (weight.detach(), [packed], torch.tensor([0, -1] * 3), bias.detach())
        b = b + mft_kernels.masked_linear_many(x, *every)
        out = mft_kernels.accumulate_score_grad(torch.zeros(5, 37), a.detach(), x, weight, scores=scores.detach())
        mft_kernels.accumulate_score_grad(out, a.detach(), x, None)
        return a + b, mask, out

    def run(function):
        leaves = _leaves(t, "x", "weight", "scores", "bias")
        y, mask, out = function(*leaves)
        y.backward(t.grad_output)
        return [y.detach(), mask, out, *(leaf.grad for leaf in leaves)]

    torch._dynamo.reset()
    for a, b in zip(run(everything), run(torch.compile(everything, fullgraph=True))):
        assert torch.equal(a, b)


def test_autocast_casts_x_weight_and_bias_but_never_scores():
    t = random_inputs(6, 5, 37)
    # 1 and 1 + 2**-12 are the same number in bf16; the mask must still distinguish them.
    scores = torch.where(t.scores > 0, 1 + 2**-12, 1.0).requires_grad_()
    threshold = torch.tensor(1 + 2**-12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = mft_kernels.masked_linear(t.x, t.weight, scores, threshold, t.bias)
    assert y.dtype == torch.bfloat16
    cast = [v.bfloat16() for v in (t.x, t.weight)]
    assert torch.equal(y, mft_kernels.masked_linear(*cast, scores, threshold, t.bias.bfloat16()))
    y.sum().backward()
    assert scores.grad.dtype == torch.float32


# ------------------------------------------------------------------------------------------------ the public door

NEITHER = {"weight": None, "scores": None}  # of accumulate_score_grad: the product alone is added


@pytest.mark.parametrize("keep_ratio", [-0.1, 1.1, torch.nan, torch.inf])
def test_a_keep_ratio_outside_of_0_to_1_is_refused(keep_ratio):
    with pytest.raises(ValueError, match=r"keep_ratio must lie in \[0, 1\].*got"):
        mft_kernels.kept_threshold(torch.ones(3, 3), keep_ratio)


def test_keep_ratio_1_keeps_all_and_0_keeps_none():
    scores = random_inputs(1, 6, 7).scores
    for keep_ratio, expected in ((1, True), (0, False), (1.0, True), (0.0, False)):
        packed = mft_kernels.pack_mask(scores, mft_kernels.kept_threshold(scores, keep_ratio))
        assert torch.equal(mft_kernels.unpack_mask(packed, scores.shape), torch.full((6, 7), expected))


@pytest.mark.parametrize(
    ("packed", "error", "message"),
    [
        (torch.zeros(4, 1), TypeError, "packed must be int32, got torch.float32"),
        (torch.zeros(4, 3, dtype=torch.int32), ValueError, r"packed must be \(4, 2\), 1 bit per weight of \(4, 33\)"),
    ],
)
def test_a_packed_mask_of_another_form_is_refused(packed, error, message):
    with pytest.raises(error, match=message):
        mft_kernels.unpack_mask(packed, (4, 33))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"masks": torch.zeros(4, 1)}, ValueError, r"masks must be \(masks, 4, 1\) in one tensor, got \(4, 1\)"),
        ({"masks": [torch.zeros(4, 1)]}, TypeError, r"masks\[0\] must be int32, got torch.float32"),
        ({"masks": torch.zeros(17, 4, 1, dtype=torch.int32)}, ValueError, "masks must be at most 16, got 17"),
        ({"tasks": torch.zeros(2)}, TypeError, "tasks must be integers, got torch.float32"),
        (
            {"tasks": torch.tensor([0])},
            ValueError,
            r"tasks must hold one task per row of x .*, got \(1,\) for x of \(2, 5\)",
        ),
        ({"x": torch.ones(5)}, ValueError, r"tasks must hold one task per row of x .*, got \(2,\) for x of \(5,\)"),
        ({"tasks": torch.tensor([0, 1])}, ValueError, "tasks must be -1 or the index of one of 1 masks, got .* 0 to 1"),
        ({"tasks": torch.tensor([-2, 0])}, ValueError, "got values from -2 to 0"),
        ({"weight": torch.ones(4, 5, requires_grad=True)}, ValueError, "weight must be frozen, as masked_linear_many"),
        ({"bias": torch.ones(4, requires_grad=True)}, ValueError, "bias must be frozen, as masked_linear_many"),
    ],
)
def test_masked_linear_many_names_argument_rule_and_value(change, error, message):
    masks, tasks = torch.zeros(1, 4, 1, dtype=torch.int32), torch.tensor([0, -1])
    arguments = {"x": torch.ones(2, 5), "weight": torch.ones(4, 5), "masks": masks, "tasks": tasks} | change
    with pytest.raises(error, match=message):
        mft_kernels.masked_linear_many(**arguments)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"out": torch.zeros(5, 4)}, ValueError, r"out must be contiguous and match weight \(4, 5\), got \(5, 4\)"),
        ({"signs": torch.ones(4, 1).int()} | NEITHER, ValueError, "signs must be None if weight is None"),
        ({"x": torch.ones(2, 4)} | NEITHER, ValueError, r"x must end in K = 5 of out \(4, 5\), got shape \(2, 4\)"),
        ({"grad_output": torch.ones(3, 4)} | NEITHER, ValueError, r"grad_output must be \(2, 4\), got \(3, 4\)"),
    ],
)
def test_accumulate_score_grad_refuses_what_it_cannot_add_into(change, error, message):
    """Without a weight, nothing else is taken, and shapes come from out."""
    matrices = dict.fromkeys(("weight", "scores"), torch.ones(4, 5))
    given = {"out": torch.zeros(4, 5), "grad_output": torch.ones(2, 4), "x": torch.ones(2, 5), **matrices} | change
    with pytest.raises(error, match=message):
        mft_kernels.accumulate_score_grad(**given)
    assert not given["out"].any()
