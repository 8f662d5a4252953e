"""Argument checks of the public functions over experts; see checks.py."""

from typing import Any

import torch
from torch import Tensor

from .checks import check_bias, check_device, check_multiplied, check_tensor


def check_grouped(call: Any) -> Any:
    """Return the call. Raises: unless x (T, K), weight (E, N, K), offsets (E,) and bias (E, N) fit each other.

    If transposed, weight is (E, K, N).
    """
    x, weight, transposed = call.x, call.weight, call.transposed
    check_tensor("x", x)
    check_tensor("weight", weight)
    layout = "(E, K, N)" if transposed else "(E, N, K)"
    if weight.dim() != 3:
        raise ValueError(f"weight must be {layout}, the experts in one tensor, got shape {tuple(weight.shape)}")
    if weight.shape[0] == 0:
        raise ValueError(f"weight must hold at least one expert, got {layout} = {tuple(weight.shape)}")
    n, k = (weight.shape[2], weight.shape[1]) if transposed else (weight.shape[1], weight.shape[2])
    if x.dim() != 2 or x.shape[1] != k:
        other = "" if x.dim() != 2 or x.shape[1] != n else f"; transposed={not transposed} reads it as the other layout"
        raise ValueError(
            f"x must be (rows, {k}), with in_features of weight {layout} = {tuple(weight.shape)}, got shape "
            f"{tuple(x.shape)}{other}"
        )
    check_multiplied(x, weight)
    check_offsets(call.offsets, weight.shape[0], x)
    check_bias(call.bias, x, (weight.shape[0], n), "one value per output feature and expert ")
    return call


def check_offsets(offsets: Tensor, experts: int, x: Tensor) -> None:
    """Raise unless offsets are int32, have shape (E,) and lie on x's device.

    check_offset_values checks their values.
    """
    check_tensor("offsets", offsets)
    if offsets.dtype != torch.int32:
        raise TypeError(f"offsets must be int32, as for torch's grouped_mm, got {offsets.dtype}; use offsets.int()")
    if offsets.shape != (experts,):
        raise ValueError(
            f"offsets must be ({experts},), where the rows of each expert end, got shape {tuple(offsets.shape)}; "
            "cumsum the number of rows of each expert"
        )
    check_device("offsets", offsets, "x", x)


def check_offset_values(call: Any) -> None:
    """Raise unless offsets on the CPU are at least 0, never decrease and end within the rows of x.

    Offsets on an accelerator are not checked, because reading them would wait for the device.
    """
    offsets, rows = call.offsets, len(call.x)
    if offsets.device.type != "cpu" or offsets.numel() == 0:
        return
    ends = offsets.tolist()
    begin = 0
    for e, end in enumerate(ends):
        if end < begin:
            raise ValueError(
                f"offsets must not decrease, because the rows of expert {e} cannot end before they begin, got {end} "
                f"after {begin}"
            )
        begin = end
    if begin > rows:
        raise ValueError(f"offsets must end within the {rows} rows of x, got {begin}")
