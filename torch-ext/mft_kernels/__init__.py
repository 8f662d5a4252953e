"""The kernel of the Kernel Hub: ops on masked weights, and layers without state (docs/how-to/kernel-hub.md).

It replaces mft_kernels/__init__.py; building/hub_kernel.py copies what it imports from there next to it.
"""

from .backends import cpu, cuda, triton  # noqa: F401  (they register themselves in the table)
from .backends.table import backend_report
from .layers import stateless as layers
from .mask.by_ratio import masked_linear_by_ratio
from .mask.scores import watch
from .ops.linear import accumulate_score_grad, masked_linear, masked_linear_packed
from .ops.select import kept_threshold, pack_mask, unpack_mask
from .ops.step import score_step

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
