"""What the kernel of the Kernel Hub offers: ops on masked weights, and layers without state (docs/kernel-hub.md).

It takes the place of mft_kernels/__init__.py; building/hub_kernel.py puts beside it what it imports from there.
"""

from . import cpu, cuda, layers, triton  # noqa: F401  (the others enter their backends into the table)
from .backends import backend_report
from .masking import masked_linear_by_ratio
from .ops import (
    accumulate_score_grad,
    kept_threshold,
    masked_linear,
    masked_linear_packed,
    pack_mask,
    unpack_mask,
)
from .scores import watch
from .step import score_step

__all__ = [
    "accumulate_score_grad",
    "backend_report",
    "kept_threshold",
    "layers",
    "masked_linear",
    "masked_linear_by_ratio",
    "masked_linear_packed",
    "pack_mask",
    "score_step",
    "unpack_mask",
    "watch",
]
