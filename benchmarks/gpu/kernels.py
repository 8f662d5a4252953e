"""The sets of kernels that are checked and timed, by name: functions with the names and arguments of the reference."""

import functools
from types import SimpleNamespace

import mft_kernels.backends.cuda
from mft_kernels.backends.triton import bits, choice, ops, quantized, select

from .cases import AUTO, CUDA, FUSED

SCRATCH = "scratch"
_CHOOSE = {FUSED: ops.always_fused, AUTO: choice.automatic, SCRATCH: ops.always_scratch}
_CHOSEN = (
    ops.masked_linear,
    ops.masked_linear_backward,
    ops.masked_linear_packed,
    ops.masked_linear_packed_backward,
)
_OTHERS = (ops.accumulate_score_grad, ops.accumulate_product, select.kept_threshold, bits.pack_mask, bits.pack_signs)
_OVER_CODES = (quantized.masked_linear_quantized, quantized.masked_linear_quantized_d_x)
OPS = tuple(f.__name__ for f in (*_CHOSEN, *_OTHERS))
OVER_CODES = tuple(f.__name__ for f in _OVER_CODES)
OVER_EXPERTS = ("grouped_product", "grouped_score_grad", "kept_thresholds")  # checked of CUDA's


@functools.cache
def kernels(name: str) -> SimpleNamespace:
    """FUSED, AUTO or SCRATCH of Triton, or CUDA: the ops of the reference, as attributes."""
    if name == CUDA:
        every = (*OPS, *OVER_CODES, *OVER_EXPERTS)
        return SimpleNamespace(name=name, **{op: getattr(mft_kernels.backends.cuda, op) for op in every})
    chosen = {f.__name__: functools.partial(f, choose=_CHOOSE[name]) for f in _CHOSEN}
    return SimpleNamespace(name=name, **chosen, **{f.__name__: f for f in (*_OTHERS, *_OVER_CODES)})
