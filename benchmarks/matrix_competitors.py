"""The work on a score matrix once per step, in each formulation: threshold, packing, optimiser step.

threshold   of bf16 scores; the baseline copies them
packing     the mask of bf16 scores as bits; the baseline copies them
optimiser   one AdamW step; the baseline is torch's fused AdamW on the fp32 masters of a dense layer's weight, from
            finished gradients. Ours and eager start from grad.T @ x and must apply weight and sign; ours also finds
            the next mask.
"""

from collections.abc import Callable

import torch
from torch import Tensor

import mft_kernels
from mft_kernels import score_step
from mft_kernels.testing import random_inputs

from .layer_competitors import COMPILED, EAGER
from .rivals import KEEP_RATIO

COPY, SORT, KTH_VALUE, BYTES = "copy", "sort", "kthvalue", "eager, a byte a weight"
OURS, OURS_INT16, OURS_FP32 = "ours", "ours, int16 and 8 bits", "ours, fp32"
FUSED, FOREACH = "torch AdamW, fused", "torch AdamW, foreach"
BASELINES = {"threshold": COPY, "packing": COPY, "optimiser": FUSED}
FORMS = {OURS: "scores", OURS_INT16: "int16", OURS_FP32: "fp32", FUSED: "dense"}
LR = 3e-4
BETAS, EPSILON = (0.9, 0.999), 1e-8

Calls = dict[str, Callable[[], object]]


def threshold_calls(n: int, k: int, *, slow: bool) -> Calls:
    """Return ways to find the k-th largest magnitude, including ``slow`` ones. Raises RuntimeError if they disagree."""
    scores = _scores(n, k).flatten()
    dropped = int((1 - KEEP_RATIO) * scores.numel())
    found: Calls = {OURS: lambda: mft_kernels.kept_threshold(scores, KEEP_RATIO)}
    if slow:
        found[SORT] = lambda: scores.abs().sort().values[dropped]
        found[KTH_VALUE] = lambda: scores.abs().kthvalue(dropped + 1).values
    answers = {name: call().item() for name, call in found.items()}  # type: ignore[attr-defined]
    if len(set(answers.values())) != 1:
        raise RuntimeError(f"the ways to find the threshold must agree, got {answers}")
    return {COPY: _copy(scores), **found}


def packing_calls(n: int, k: int) -> Calls:
    """Return ways to make the mask as bits, and as bytes, the most compact format that PyTorch has an op for."""
    scores = _scores(n, k)
    threshold = mft_kernels.kept_threshold(scores, KEEP_RATIO)
    return {
        COPY: _copy(scores),
        OURS: lambda: mft_kernels.pack_mask(scores, threshold),
        EAGER: lambda: eager_pack(scores, threshold),
        COMPILED: lambda: compiled_pack(scores, threshold),
        BYTES: lambda: scores.abs() >= threshold,
    }


def optimiser_calls(n: int, k: int) -> Calls:
    """Return functions that do one step each, on their own states."""
    weight, grad = (0.02 * torch.randn(n, k)).bfloat16(), torch.randn(n, k).bfloat16()
    found: Calls = {}
    for name, options in ((FUSED, {"fused": True}), (FOREACH, {"foreach": True})):
        p = torch.nn.Parameter(_scores(n, k).float())
        p.grad = grad.float()
        found[name] = torch.optim.AdamW([p], lr=LR, weight_decay=0.0, **options).step
    found[OURS_INT16] = _ours(n, k, grad, weight, torch.int16)
    found[OURS_FP32] = _ours(n, k, grad, weight, torch.float32)
    for name, function in ((EAGER, eager_step), (COMPILED, compiled_step)):
        states = (_scores(n, k).float(), torch.zeros(n, k), torch.zeros(n, k))
        found[name] = lambda function=function, states=states: function(*states, grad, weight)
    return found


def eager_pack(scores: Tensor, threshold: Tensor) -> Tensor:
    """pack_mask by shifts and sums; K must be a multiple of 32."""
    bits = (scores.abs() >= threshold).view(scores.shape[0], -1, 32)
    return (bits.int() << torch.arange(32, dtype=torch.int32)).sum(-1, dtype=torch.int32)


def eager_step(scores: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, grad: Tensor, weight: Tensor) -> None:
    """AdamW on grad * weight * sign(scores), without the bias corrections, which are 1 at a late step."""
    score_grad = grad * weight * scores.sign()
    exp_avg.lerp_(score_grad, 1 - BETAS[0])
    exp_avg_sq.mul_(BETAS[1]).addcmul_(score_grad, score_grad, value=1 - BETAS[1])
    scores.addcdiv_(exp_avg, exp_avg_sq.sqrt().add_(EPSILON), value=-LR)


compiled_pack = torch.compile(eager_pack, fullgraph=True, dynamic=True)
compiled_step = torch.compile(eager_step, fullgraph=True, dynamic=True)


def _scores(n: int, k: int) -> Tensor:
    return random_inputs(1, n, k, torch.bfloat16, torch.bfloat16).scores


def _copy(scores: Tensor) -> Callable[[], object]:
    target = torch.empty_like(scores)
    return lambda: target.copy_(scores)


def _ours(n: int, k: int, grad: Tensor, weight: Tensor, dtype: torch.dtype) -> Callable[[], object]:
    """Return a step of scores in fp32 with fp32 moments, or in int16 with 8-bit moments; each finds the next mask."""
    scores, scales = _scores(n, k).float(), None
    if dtype == torch.int16:
        scores, scales = mft_kernels.fixed_from_float(scores), torch.zeros(2, -(-n * k // 256))
    moments = [torch.zeros(n, k, dtype=torch.float32 if scales is None else torch.uint8) for _ in range(2)]
    step, threshold = 0, None

    def run() -> None:
        nonlocal step, threshold
        step += 1
        options = {"step": step, "lr": LR, "keep_ratio": KEEP_RATIO, "threshold": threshold}
        threshold = score_step(scores, grad, weight, *moments, scales, **options)[0]

    return run
