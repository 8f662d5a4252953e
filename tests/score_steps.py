"""Inputs of score_step that meet every corner of a format, and the arguments that most tests leave alone."""

import torch

from mft_kernels.reference import step as reference_step
from mft_kernels.reference.fixed_point import fixed_from_float

DEFAULTS = {
    "step": 1,
    "lr": 1e-3,
    "beta1": 0.9,
    "beta2": 0.999,
    "eps": 1e-8,
    "weight_decay": 0.0,
    "grad_scale": None,
    "seed": 7,
    "mode": "magnitude",
    "keep_ratio": 0.9,
    "threshold": None,
}


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def scores_of(values, dtype):
    return fixed_from_float(values) if dtype == torch.int16 else values.to(dtype)


def arguments(shape, dtype, eight_bit, weight_dtype=torch.bfloat16, grad_dtype=torch.float32):
    """Scores with zeros of either sign among them, and fresh moments."""
    values = 0.02 * normal(*shape)
    values.view(-1)[1::11] = 0
    scores = scores_of(values, dtype)
    if dtype != torch.float32:
        scores.view(torch.int16).view(-1)[1::22] = -0x8000
    moments = torch.uint8 if eight_bit else torch.float32
    return {
        "scores": scores,
        "grad": normal(*shape, seed=1).to(grad_dtype),
        "weight": None if weight_dtype is None else (0.02 * normal(*shape, seed=2)).to(weight_dtype),
        "exp_avg": torch.zeros(shape, dtype=moments),
        "exp_avg_sq": torch.zeros(shape, dtype=moments),
        "scales": torch.zeros(2, -(-scores.numel() // reference_step.BLOCK)) if eight_bit else None,
    }
