"""The oracle in plain PyTorch: functions.py defines what each function of a backend computes."""

from .functions import decode, kept, pack, product, score_grad, select, signs
from .linear import (
    Gradients,
    filled,
    grad_of_linear,
    keep_mask,
    kept_count,
    kept_threshold,
    linear,
    pack_bits,
    pack_mask,
    pack_signs,
    signs_of,
    unpack_mask,
    weight_gradient,
)

__all__ = [
    "Gradients",
    "decode",
    "filled",
    "grad_of_linear",
    "keep_mask",
    "kept",
    "kept_count",
    "kept_threshold",
    "linear",
    "pack",
    "pack_bits",
    "pack_mask",
    "pack_signs",
    "product",
    "score_grad",
    "select",
    "signs",
    "signs_of",
    "unpack_mask",
    "weight_gradient",
]
