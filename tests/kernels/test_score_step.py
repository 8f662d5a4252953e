"""The public step on scores: its arithmetic, its mask, PyTorch's machinery, and what it refuses.

tests/ops/test_step.py checks that backends give the reference's bits.
"""

import math

import pytest
import torch
from products import MODES
from score_steps import Matrix, assert_same
from torch.library import opcheck

from mft_kernels import float_from_fixed, reference, score_step
from mft_kernels.reference.fixed_point import selectable

SCORES = (torch.float32, torch.bfloat16, torch.int16)


# ---------------------------------------------------------------------------------------------- arithmetic


def test_a_fixed_point_zero_keeps_its_sign_and_counts_as_it():
    scores = torch.tensor([[0, -0x8000]], dtype=torch.int16)
    still = scores.clone()
    zeros = torch.zeros(1, 2)
    score_step(still, zeros, zeros + 1, zeros.clone(), zeros.clone(), step=1, lr=0.01)
    assert torch.equal(still, scores)
    # A gradient that raises the weight raises the magnitude of either zero, away from 0 on its own side.
    score_step(scores, zeros - 1, zeros + 1, zeros.clone(), zeros.clone(), step=1, lr=0.01)
    assert torch.equal(float_from_fixed(scores).sign(), torch.tensor([[1.0, -1.0]]))
    assert float_from_fixed(scores).abs().min() > 0.009


def test_a_factor_on_the_device_scales_the_gradient():
    scaled, plain = Matrix(9, 70), Matrix(9, 70)
    grad = plain.next_grad()
    scaled.step(grad, 1, grad_scale=torch.tensor(0.25))
    plain.step(grad * 0.25, 1)
    assert torch.equal(scaled.scores, plain.scores)
    assert torch.equal(scaled.moments[0], plain.moments[0])


# ---------------------------------------------------------------------------------------------- the mask


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("scores", SCORES)
@pytest.mark.parametrize("keep_ratio", [0.0, 0.3, 0.9, 1.0])
def test_the_result_is_the_threshold_and_mask_of_the_new_scores(mode, scores, keep_ratio):
    matrix = Matrix(31, 77, scores, "8bit")
    threshold, packed = matrix.step(matrix.next_grad(), 1, keep_ratio=keep_ratio, mode=mode, backend="reference")
    floats = selectable(matrix.scores)
    want = reference.kept_threshold(floats, keep_ratio, mode)
    assert threshold.dtype == scores
    assert_same("threshold", selectable(threshold), want)
    assert torch.equal(packed, reference.pack_mask(floats, want, mode))


def test_without_a_keep_ratio_there_is_no_result():
    matrix = Matrix(3, 5)
    assert matrix.step(matrix.next_grad(), 1) is None


# ---------------------------------------------------------------------------------------------- the dispatcher


@pytest.mark.parametrize(
    ("scores", "moments", "keep_ratio"),
    [
        (torch.float32, "fp32", None),
        (torch.bfloat16, "8bit", 0.8),
        (torch.int16, "8bit", None),
        (torch.int16, "fp32", 0.8),
    ],
)
def test_opcheck(scores, moments, keep_ratio):
    matrix = Matrix(33, 70, scores, moments)
    moment_tensors = [*matrix.moments, None][:3]
    numbers = (1, 1e-3, 0.9, 0.999, 1e-8, 0.1)
    rest = (torch.tensor(0.5), 0, "magnitude", keep_ratio, None, "auto")
    arguments = (matrix.scores, matrix.next_grad(), matrix.weight, *moment_tensors, *numbers, *rest)
    opcheck(torch.ops.mft.score_step.default, arguments)


def test_it_compiles_without_a_graph_break():
    matrix = Matrix(20, 64, moments="8bit")
    eager, grad = matrix.clone(), matrix.next_grad()
    compiled = torch.compile(lambda grad: matrix.step(grad, 1, keep_ratio=0.9), fullgraph=True, backend="aot_eager")
    threshold, packed = compiled(grad)
    want = eager.step(grad, 1, keep_ratio=0.9)
    assert_same("scores", matrix.scores, eager.scores)
    assert_same("threshold", threshold, want[0])
    assert torch.equal(packed, want[1])


# ---------------------------------------------------------------------------------------------- errors


OK = {"step": 1, "lr": 1e-3}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lr": -1.0}, ValueError, "lr must be finite and at least 0, got -1.0"),
        ({"lr": "1"}, TypeError, "lr must be a number, got str; use float(lr)"),
        ({"lr": torch.ones(2)}, ValueError, "lr must be a number or a scalar (), got (2,)"),
        ({"step": torch.ones(1)}, ValueError, "step must be a number or a scalar (), got (1,)"),
        ({"step": torch.tensor(1), "lr": None}, TypeError, "lr must be a number, got NoneType; use float(lr)"),
        ({"betas": (0.9, 1.0)}, ValueError, "betas[1] must lie in [0, 1), got 1.0"),
        ({"eps": math.nan}, ValueError, "eps must be finite and at least 0, got nan"),
        ({"weight_decay": -0.1}, ValueError, "weight_decay must be finite and at least 0, got -0.1"),
        ({"seed": -1}, ValueError, "seed must be an integer in [0, 2^63), got -1"),
        ({"mode": "sign"}, ValueError, "mode must be one of ('magnitude', 'value'), got 'sign'"),
        ({"keep_ratio": 1.5}, ValueError, "keep_ratio must lie in [0, 1]"),
        (
            {"threshold": torch.tensor(1, dtype=torch.int16)},
            TypeError,
            "threshold must be torch.float32, got torch.int16",
        ),
        ({"grad_scale": torch.ones(2)}, ValueError, "grad_scale must be a scalar (), got (2,)"),
        ({"backend": "cuda"}, RuntimeError, "backend='cuda' cannot serve score_step"),
    ],
)
def test_a_wrong_option_is_refused_by_name(options, error, message):
    matrix = Matrix(4, 8)
    with pytest.raises(error) as caught:
        score_step(matrix.scores, matrix.next_grad(), None, *matrix.moments, **{**OK, **options})
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("name", "tensor", "error", "message"),
    [
        ("scores", torch.zeros(4, 8).half(), TypeError, "scores must be float32, bfloat16 (rounded stochastically) or"),
        ("scores", torch.zeros(4, 8).double(), TypeError, "scores must be float32, bfloat16"),
        ("scores", torch.zeros(8), ValueError, "scores must be (N, K) and contiguous"),
        ("grad", torch.zeros(8, 4), ValueError, "grad must match scores (4, 8), got (8, 4)"),
        ("grad", torch.zeros(4, 8).long(), TypeError, "grad must be float32, bfloat16 or float16, got torch.int64"),
        ("weight", torch.zeros(4, 9), ValueError, "weight must match scores (4, 8), got (4, 9)"),
        ("exp_avg", torch.zeros(4, 8).bfloat16(), TypeError, "exp_avg must be torch.float32 without scales, got"),
        (
            "exp_avg_sq",
            torch.zeros(4, 9),
            ValueError,
            "exp_avg_sq must be contiguous and match scores (4, 8), got (4, 9)",
        ),
        ("scales", torch.zeros(2, 1), TypeError, "exp_avg must be torch.uint8 with scales, got torch.float32"),
        ("scales", torch.zeros(2, 2), ValueError, "scales must be contiguous (2, 1), one per block of 256, got (2, 2)"),
    ],
)
def test_a_wrong_tensor_is_refused_by_name(name, tensor, error, message):
    tensors = dict.fromkeys(("scores", "grad", "weight", "exp_avg", "exp_avg_sq"), torch.zeros(4, 8)) | {"scales": None}
    if "per block" in message:
        tensors |= dict.fromkeys(("exp_avg", "exp_avg_sq"), torch.zeros(4, 8, dtype=torch.uint8))
    with pytest.raises(error) as caught:
        score_step(**{**tensors, name: tensor}, **OK)
    assert message in str(caught.value)
