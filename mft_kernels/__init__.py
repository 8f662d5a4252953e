"""Mask fine-tuning: fused masked-linear kernels, their reference, and MaskedLinear, a drop-in for nn.Linear."""

from .ops.checks import check_torch

check_torch()  # first: the imports below need what an older torch lacks

from ._version import __version__ as __version__
from .backends import cpu, cuda, triton  # noqa: F401  (they register themselves in the table)
from .backends.table import backend_report, import_entry_points
from .layers import maskable  # noqa: F401  (it registers a hook of torch)
from .layers.attention import MaskedMultiheadAttention
from .layers.grouped_linear import MaskedGroupedLinear
from .layers.linear import MaskedLinear
from .layers.masked_layer import MaskedLayer
from .mask.by_ratio import masked_linear_by_ratio, masked_linear_grouped_by_ratio
from .mask.masking import outdate
from .ops.grouped import accumulate_score_grad_grouped, masked_linear_grouped, masked_linear_grouped_packed
from .ops.linear import accumulate_score_grad, masked_linear, masked_linear_packed
from .ops.many import masked_linear_many
from .ops.quantized import dequantize, masked_linear_quantized
from .ops.select import kept_threshold, kept_thresholds, pack_mask, unpack_mask
from .ops.step import score_step
from .optim import MaskAdamW
from .reference.fixed_point import fixed_from_float, float_from_fixed

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

import_entry_points()  # last: those modules import the names above
