"""The oracle: every op in plain PyTorch. Kernels are checked against these functions.

Here are those over one dense matrix (linear.py); quantized, grouped, step and fixed_point are modules of their own.
"""

from .linear import (
    Gradients,
    accumulate_product,
    accumulate_score_grad,
    filled,
    grad_of_linear,
    keep_mask,
    kept_count,
    kept_threshold,
    linear,
    masked_linear,
    masked_linear_backward,
    masked_linear_many,
    masked_linear_many_backward,
    masked_linear_packed,
    masked_linear_packed_backward,
    pack_bits,
    pack_mask,
    pack_signs,
    signs_of,
    unpack_mask,
)

__all__ = [
    "Gradients",
    "accumulate_product",
    "accumulate_score_grad",
    "filled",
    "grad_of_linear",
    "keep_mask",
    "kept_count",
    "kept_threshold",
    "linear",
    "masked_linear",
    "masked_linear_backward",
    "masked_linear_many",
    "masked_linear_many_backward",
    "masked_linear_packed",
    "masked_linear_packed_backward",
    "pack_bits",
    "pack_mask",
    "pack_signs",
    "signs_of",
    "unpack_mask",
]
