"""One optimiser step on scores, and the mask that they select next."""

from typing import Any

import torch
from torch import Tensor

from ..backends.table import choose
from ..operands import Update
from .checks import (
    check_adam,
    check_betas,
    check_device,
    check_keep_ratio,
    check_mode,
    check_moments,
    check_number,
    check_step_inputs,
    check_tensor,
)
from .route import Op


def score_step(
    scores: Tensor,
    grad: Tensor,
    weight: Tensor | None,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    scales: Tensor | None = None,
    *,
    step: int | Tensor,
    lr: float | Tensor,
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
    """Compute ``scores -= lr * AdamW(grad * weight * sign(scores))`` in place, then the next mask if asked.

    One pass updates scores and moments. reference/step.py has the formulas of both schemes, exact and 8-bit.

    Args:
        scores: (N, K), contiguous, changed in place. fp32; or bf16 or int16 fixed point, rounded stochastically.
            int16 holds sign and magnitude in steps of 2^-18, up to 0.121, and errs three times less than bf16.
        grad: (N, K), fp32, bf16 or fp16: grad_output.T @ x, or d_scores if weight is None.
        weight: (N, K), fp32, bf16 or fp16: a factor of grad, with sign(scores) in mode "magnitude". If None, neither
            factor is applied.
        exp_avg, exp_avg_sq: (N, K), contiguous, changed in place. fp32 for the exact scheme (scales None), which equals
            torch.optim.AdamW bit for bit; uint8 for the 8-bit scheme, whose moments do not include the factor weight.
        scales: fp32 (2, ceil(N * K / 256)): of exp_avg and exp_avg_sq, one per block of 256 consecutive elements.
        step: the number of this step, from 1, or a tensor () on the scores' device. An optimiser of many matrices may
            give a row of operands.clocks_of, and lr as a tensor.
        lr: score units per step, or a tensor () on the scores' device. Kernels read such tensors when they run, so each
            replay of a captured CUDA graph uses the values of that moment.
        grad_scale: () fp32 on grad's device: a factor of grad, for instance from gradient clipping.
        seed: of the stochastic rounding, in [0, 2^63). Equal arguments give equal results, so each matrix needs its own
            seed.
        keep_ratio: if given, the next threshold and mask are returned.
        threshold: the threshold before the step, if known; it saves a pass.
    Returns: None without keep_ratio. Otherwise the threshold () in the scores' dtype (an int16 code for int16 scores)
        and the packed mask int32 (N, ceil(K / 32)): those of kept_threshold and pack_mask for the new scores. If a
        score is not finite, the threshold is NaN (0x7e00 for int16) and nothing is kept.
    Raises: ValueError for shapes, devices or values, TypeError for dtypes, RuntimeError for a backend that cannot
        serve.
    """
    op = _SCORE_STEP
    if isinstance(step, Tensor) or isinstance(lr, Tensor):
        op, step, lr = _ON_DEVICE, scalar_of("step", step, scores, (4,)), scalar_of("lr", lr, scores)
    found, packed = op(
        scores,
        grad,
        weight,
        exp_avg,
        exp_avg_sq,
        scales,
        step,
        lr,
        *check_betas(betas),
        eps,
        weight_decay,
        grad_scale,
        seed,
        mode,
        keep_ratio,
        threshold,
        backend,
    )
    return None if keep_ratio is None else (found, packed)


def _check(call: Any) -> Any:
    update = Update(*call[:-1])
    check_mode(update.mode)
    check_step_inputs(update.scores, update.grad, update.weight, update.grad_scale, update.threshold)
    check_moments(update.scores, update.exp_avg, update.exp_avg_sq, update.scales)
    counted = isinstance(update.step, Tensor)
    check_adam(0.0 if counted else update.lr, (update.beta1, update.beta2), update.eps, update.weight_decay)
    if not counted and (not isinstance(update.step, int) or update.step < 1):
        raise ValueError(f"step must be an integer from 1, got {update.step!r}; it counts the steps of this matrix")
    if not isinstance(update.seed, int) or not 0 <= update.seed < 2**63:
        raise ValueError(f"seed must be an integer in [0, 2^63), got {update.seed!r}")
    if update.keep_ratio is not None:
        check_keep_ratio(update.keep_ratio)
    return call


def _step(call: Any) -> tuple[Tensor, Tensor]:
    update = Update(*call[:-1])
    # Backends do not list int16 among their dtypes: whichever serves "step" also takes fixed-point scores.
    tensors = (update.scores, update.grad, update.weight)
    dtypes = tuple(t.dtype for t in tensors if t is not None and t.dtype != torch.int16)
    return choose("step", update.scores.device, dtypes, call.backend, op="score_step")(update)


def scalar_of(name: str, value: float | Tensor, scores: Tensor, clock: tuple[int, ...] = ()) -> Tensor:
    """Return value as a tensor () on the scores' device, or of the shape ``clock`` if it is a tensor of that shape.

    Raises: TypeError or ValueError, naming the argument.
    """
    if not isinstance(value, Tensor):
        check_number(name, value)
        dtype = torch.int64 if isinstance(value, int) else torch.float64
        return torch.full((), value, dtype=dtype, device=scores.device)
    check_tensor(name, value)
    if value.shape not in ((), clock):
        raise ValueError(f"{name} must be a number or a scalar (), got {tuple(value.shape)}")
    check_device(name, value, "scores", scores)
    return value


_SCORE_STEP = Op("score_step", _step, check=_check)
_ON_DEVICE = Op("score_step_on_device", _step, check=_check)
