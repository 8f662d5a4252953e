"""The reference in plain PyTorch: functions.py defines what each function of a backend computes."""

from .functions import kept, product
from .linear import (
    keep_mask,
    kept_count,
    kept_threshold,
    linear,
    pack_bits,
    pack_mask,
    pack_signs,
    pattern_mask,
    unpack_mask,
)

__all__ = [
    "keep_mask",
    "kept",
    "kept_count",
    "kept_threshold",
    "linear",
    "pack_bits",
    "pack_mask",
    "pack_signs",
    "pattern_mask",
    "product",
    "unpack_mask",
]
