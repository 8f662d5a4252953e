"""The op score_step: the checked function that users call, then its schema and fake."""

import torch
from torch import Tensor

from .._ops import ops
from ..backends.table import choose
from .checks import check_adam, check_keep_ratio, check_mode, check_moments, check_step_inputs, check_transforms
from .library import define, increment_version


def score_step(
    scores: Tensor,
    grad: Tensor,
    weight: Tensor | None,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    scales: Tensor | None = None,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    grad_scale: Tensor | None = None,
    seed: int = 0,
    mode: str = "magnitude",
    keep_ratio: float | None = None,
    threshold: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor] | None:
    """scores -= lr * AdamW(grad * weight * sign(scores)), moments too, in one pass; then the next threshold and mask.

    reference_step.score_step has the formulas of both schemes.

    Args:
        scores: (N, K), contiguous, changed in place: fp32; bf16, rounded stochastically; or int16 fixed point (sign and
            magnitude in steps of 2^-18, up to 0.121), rounded stochastically, which errs three times less than bf16.
        grad: (N, K), fp32, bf16 or fp16: grad_output.T @ x, or d_scores if weight is None.
        weight: (N, K), fp32, bf16 or fp16: the step applies it, and sign(scores) in mode "magnitude". None: neither.
        exp_avg, exp_avg_sq: (N, K), contiguous, changed in place: fp32 for the exact scheme (scales None), which is
            torch.optim.AdamW bit for bit; uint8 for the 8-bit scheme, whose moments are free of the factor weight.
        scales: fp32 (2, ceil(N * K / 256)), of exp_avg and exp_avg_sq: one a block of 256 elements in a row.
        step: the number of this step, from 1. lr: score units a step.
        grad_scale: () fp32 on grad's device, a factor of grad, as gradient clipping finds one.
        seed: of the stochastic rounding, in [0, 2^63): equal arguments give equal results, matrices want unequal seeds.
        keep_ratio: asks for a result. threshold: the one that held before the step, where known; it saves a pass.
    Returns: None without keep_ratio, else the threshold () in the scores' dtype (an int16 code for int16) and the
        packed mask int32 (N, ceil(K / 32)), as kept_threshold and pack_mask find them for the new scores. A score that
        is not finite makes the threshold NaN (0x7e00 for int16), and nothing is kept.
    Raises: ValueError for shapes, devices or values, TypeError for dtypes, RuntimeError for a refusing backend.
    """
    check_mode(mode)
    check_step_inputs(scores, grad, weight, grad_scale, threshold)
    check_moments(scores, exp_avg, exp_avg_sq, scales)
    check_adam(lr, betas, eps, weight_decay)
    check_transforms("score_step", scores, grad, weight, exp_avg, exp_avg_sq, in_place=True)
    if not isinstance(step, int) or step < 1:
        raise ValueError(f"step must be an integer from 1, got {step!r}; it counts the steps of this matrix")
    if not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise ValueError(f"seed must be an integer in [0, 2^63), got {seed!r}")
    if keep_ratio is not None:
        check_keep_ratio(keep_ratio)
    with torch.no_grad():
        found, packed = ops.score_step(
            scores,
            grad,
            weight,
            exp_avg,
            exp_avg_sq,
            scales,
            step,
            float(lr),
            float(betas[0]),
            float(betas[1]),
            float(eps),
            float(weight_decay),
            grad_scale,
            seed,
            mode,
            keep_ratio,
            threshold,
            backend,
        )
    return None if keep_ratio is None else (found, packed)


def _fake(scores, grad, weight, exp_avg, exp_avg_sq, scales, *rest):
    keep_ratio = rest[9]
    if keep_ratio is None:
        return scores.new_empty(0), scores.new_empty(0, dtype=torch.int32)
    words = (scores.shape[0], (scores.shape[1] + 31) // 32)
    return scores.new_empty(()), scores.new_empty(words, dtype=torch.int32)


def _dtypes(*tensors: Tensor | None) -> tuple[torch.dtype, ...]:
    # Fixed-point scores are no dtype of the table: whoever serves the op serves them.
    return tuple(t.dtype for t in tensors if t is not None and t.dtype != torch.int16)


def _step(scores, grad, weight, exp_avg, exp_avg_sq, scales, *rest):
    kernel = choose("score_step", scores.device, _dtypes(scores, grad, weight), rest[-1])
    result = kernel(scores, grad, weight, exp_avg, exp_avg_sq, scales, *rest[:-1])
    increment_version([t for t in (scores, exp_avg, exp_avg_sq, scales) if t is not None])
    return result


# "mask_mode": see accumulate_score_grad.
define(
    "score_step(Tensor(a!) scores, Tensor grad, Tensor? weight, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, "
    "Tensor(d!)? scales, int step, float lr, float beta1, float beta2, float eps, float weight_decay, "
    "Tensor? grad_scale, int seed, str mask_mode, float? keep_ratio, Tensor? threshold, str backend) "
    "-> (Tensor, Tensor)",
    _fake,
    _step,
)
