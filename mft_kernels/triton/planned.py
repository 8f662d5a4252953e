"""A forward by cubins, remembered by the layout of its arguments: the next call alike is one op of csrc/cuda.

What is remembered is what the first call launched: binaries, grids and values, of which the addresses of the call's own
tensors are put in anew. A plan is of 16-bit weights, whose products depend on no setting of PyTorch.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..autotune import measuring
from .arguments import Keep
from .cubins import Launched
from .launch import recording
from .target import is_assumed

_KINDS = {"packed": 0, "magnitude": 1, "value": 2}
#: Slot of plan_bindings.cpp behind those of x, weight, keep, threshold, bias and y: the parts of a sum.
_PARTS = 6


_any = False  # remembered


def run(x: Tensor, weight: Tensor, keep: Keep, bias: Tensor | None, *, automatic: bool) -> Tensor | None:
    """y (..., N) by what an earlier call has launched; None where there was none alike."""
    if not _any or recording() or is_assumed() or (automatic and measuring()):
        return None
    return torch.ops.mft_cuda.planned_forward(x, weight, keep.source, keep.thresholds, bias, _kind(keep, automatic))


def remember(
    x: Tensor,
    weight: Tensor,
    keep: Keep,
    bias: Tensor | None,
    y: Tensor,
    launched: Sequence[Launched | None],
    *,
    automatic: bool,
) -> None:
    """What a forward has launched, if that was cubins alone, and all addresses are of its own tensors."""
    global _any
    if not launched or None in launched or weight.element_size() != 2 or is_assumed() or (automatic and measuring()):
        return
    given = [(slot, t) for slot, t in enumerate((x, weight, keep.source, keep.thresholds, bias, y)) if t is not None]
    slots = {t.data_ptr(): slot for slot, t in given}
    if len(slots) < len(given):  # two begin at one address: which one is meant is not known
        return
    parts, steps = 0, []
    for one in launched:
        assert one is not None
        addresses: list[int] = []
        for at, tensor in one.addresses:
            if tensor.numel() == 0:
                continue
            slot = slots.get(tensor.data_ptr())
            if slot is None:
                if tensor.dtype != torch.float32:  # a copy of an argument
                    return
                slot, parts = _PARTS, tensor.numel()
            addresses += [at, slot]
        steps += [one.cubin, *one.grid, len(one.values), *one.values, len(addresses) // 2, *addresses]
    torch.ops.mft_cuda.plan_forward(x, weight, keep.source, keep.thresholds, bias, _kind(keep, automatic), parts, steps)
    _any = True


def forget() -> None:
    """All of it: what decides the tiles is about to change."""
    global _any
    if _any:
        torch.ops.mft_cuda.forget_plans()
    _any = False


def _kind(keep: Keep, automatic: bool) -> int:
    return 2 * _KINDS[keep.mode] + automatic
