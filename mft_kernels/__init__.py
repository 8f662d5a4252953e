"""Mask fine-tuning: fused masked-linear kernels, their reference, and MaskedLinear, a drop-in for nn.Linear."""

from .checks import check_torch

check_torch()  # before anything asks an older torch for what it lacks

from . import cpu, cuda, maskable, triton  # noqa: F401  (enter their backends into the table; torch's hook)
from ._version import __version__ as __version__
from .attention import MaskedMultiheadAttention
from .backends import backend_report, import_entry_points
from .fixed_point import fixed_from_float, float_from_fixed
from .grouped import (
    accumulate_score_grad_grouped,
    kept_thresholds,
    masked_linear_grouped,
    masked_linear_grouped_packed,
)
from .grouped_linear import MaskedGroupedLinear
from .grouped_masking import masked_linear_grouped_by_ratio
from .linear import MaskedLinear
from .many import masked_linear_many
from .masked_layer import MaskedLayer
from .masking import masked_linear_by_ratio, outdate
from .ops import (
    accumulate_score_grad,
    kept_threshold,
    masked_linear,
    masked_linear_packed,
    pack_mask,
    unpack_mask,
)
from .optim import MaskAdamW
from .quantized import dequantize, masked_linear_quantized
from .step import score_step

__all__ = [
    "MaskAdamW",
    "MaskedGroupedLinear",
    "MaskedLayer",
    "MaskedLinear",
    "MaskedMultiheadAttention",
    "accumulate_score_grad",
    "accumulate_score_grad_grouped",
    "backend_report",
    "dequantize",
    "fixed_from_float",
    "float_from_fixed",
    "kept_threshold",
    "kept_thresholds",
    "masked_linear",
    "masked_linear_by_ratio",
    "masked_linear_grouped",
    "masked_linear_grouped_by_ratio",
    "masked_linear_grouped_packed",
    "masked_linear_many",
    "masked_linear_packed",
    "masked_linear_quantized",
    "outdate",
    "pack_mask",
    "score_step",
    "unpack_mask",
]

import_entry_points()  # last: those modules import what is above
