"""Scores in 16-bit fixed point: sign and magnitude, the magnitude in steps of 2^-18.

    bit 15: sign | bits 14..0: round(|score| * 2^18), at most 31743 (0.1211)

Read as fp16, these codes have exactly the order of the scores, and 31743 is fp16's largest finite pattern. So every
kernel that selects fp16 scores selects these too. Near a threshold of 0.0025 a step is three times finer than bf16's.
"""

import math

import torch
from torch import Tensor

FIXED_POINT_STEP = 2.0**-18
LARGEST_CODE = 31743  # 0x7bff
LARGEST_FIXED = LARGEST_CODE * FIXED_POINT_STEP

_SIGN, _MAGNITUDE = -0x8000, 0x7FFF  # of an int16's bits


def fixed_from_float(scores: Tensor) -> Tensor:
    """Return the int16 codes of floating scores, rounded to nearest (even) and saturated.

    Zero of either sign becomes +0. An infinity becomes 0x7c00 with its sign, and NaN becomes 0x7c00.
    """
    if not isinstance(scores, Tensor):
        raise TypeError(f"scores must be a tensor, got {type(scores).__name__}; use torch.as_tensor(scores)")
    scores = scores.float()
    codes = (scores.abs() * 2.0**18).round().clamp(max=LARGEST_CODE)
    codes = torch.where(scores.isfinite(), codes, LARGEST_CODE + 1).to(torch.int16)
    return torch.where(scores < 0, codes | _SIGN, codes)


def float_from_fixed(codes: Tensor) -> Tensor:
    """Return the exact fp32 values of int16 codes. A code above the largest is not finite and becomes NaN."""
    if not isinstance(codes, Tensor) or codes.dtype != torch.int16:
        raise TypeError(f"codes must be int16, got {getattr(codes, 'dtype', type(codes).__name__)}")
    magnitude = (codes & _MAGNITUDE).float() * FIXED_POINT_STEP
    magnitude = torch.where((codes & _MAGNITUDE) > LARGEST_CODE, torch.nan, magnitude)
    return torch.where(codes < 0, -magnitude, magnitude)


def selectable(scores: Tensor) -> Tensor:
    """Return scores as the selecting kernels read them: fixed-point codes as fp16, all others unchanged."""
    return scores.view(torch.float16) if scores.dtype == torch.int16 else scores


def code_at_least(threshold: float) -> int:
    """Return the smallest int16 code whose score is at least ``threshold``; an infinity's code if none or all are."""
    steps = math.ceil(max(min(threshold / FIXED_POINT_STEP, LARGEST_CODE + 1), -LARGEST_CODE - 1))
    return steps if steps >= 0 else -steps + _SIGN
