"""Mask fine-tuning: fused masked-linear kernels, their reference, and MaskedLinear, a drop-in for nn.Linear."""

from . import cpu, cuda, triton  # noqa: F401  (enter their backends into the table)
from .backends import backend_report
from .linear import MaskedLinear
from .masking import masked_linear_by_ratio
from .ops import (
    accumulate_score_grad,
    kept_threshold,
    masked_linear,
    masked_linear_packed,
    pack_mask,
    unpack_mask,
)

__all__ = [
    "MaskedLinear",
    "accumulate_score_grad",
    "backend_report",
    "kept_threshold",
    "masked_linear",
    "masked_linear_by_ratio",
    "masked_linear_packed",
    "pack_mask",
    "unpack_mask",
]
