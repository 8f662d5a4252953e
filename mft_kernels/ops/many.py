"""The op masked_linear_many: many masks on one weight, one mask per row, for inference."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..operands import MOST_MASKS, KeepByTask
from . import served
from .checks import check_device, check_linear, check_packed, check_tensor
from .route import Gradient, Op, unchanged

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def masked_linear_many(
    x: Tensor,
    weight: Tensor,
    masks: Tensor | Sequence[Tensor],
    tasks: Tensor,
    bias: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """Compute ``y[i] = x[i] @ where(masks[tasks[i]], weight, 0).T + bias``, with the whole weight if tasks[i] is -1.

    For inference: the weight is read once for any number of masks. Only x gets a gradient.

    Args:
        x: (rows, ..., K), floating.
        weight: (N, K), dtype of x, frozen.
        masks: 0 to 16 masks, int32 (N, ceil(K / 32)) each, see pack_mask; a sequence, or stacked in one tensor.
        tasks: (rows,), integers from -1 to the number of masks - 1. On an accelerator they are not checked, because
            reading them would wait for the device: rows with other tasks are NaN.
        bias: (N,), dtype of x, frozen.
    Returns: (rows, ..., N) in x's dtype; accumulated in fp32. Under autocast x, weight and bias are cast.
    """
    if isinstance(masks, Tensor) and masks.dim() == 3:
        masks = masks.unbind()
    for name, tensor in (("weight", weight), ("bias", bias)):
        if isinstance(tensor, Tensor) and tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{name} must be frozen, as masked_linear_many is for inference, got one that requires a gradient: "
                f"use {name}.detach(), or masked_linear_packed with one mask per call"
            )
    return _MANY(x, weight, masks, tasks, bias, backend)


# ---------------------------------------------------------------------------------------------- argument checks


def _check_masks(masks: Tensor | Sequence[Tensor], weight: Tensor) -> None:
    words = (weight.shape[0], -(-weight.shape[1] // 32))
    if isinstance(masks, Tensor):
        raise ValueError(f"masks must be (masks, {words[0]}, {words[1]}) in one tensor, got {tuple(masks.shape)}")
    if not isinstance(masks, Sequence):
        raise TypeError(f"masks must be a sequence of tensors, or one tensor, got {type(masks).__name__}")
    if len(masks) > MOST_MASKS:
        raise ValueError(f"masks must be at most {MOST_MASKS}, got {len(masks)}: make one call per {MOST_MASKS} masks")
    for i, mask in enumerate(masks):
        check_packed(f"masks[{i}]", mask, weight.shape)
        check_device(f"masks[{i}]", mask, "weight", weight)


def _check_tasks(tasks: Tensor, x: Tensor) -> None:
    check_tensor("tasks", tasks)
    if tasks.dtype not in _INTEGERS:
        raise TypeError(f"tasks must be integers, got {tasks.dtype}")
    if x.dim() < 2 or tasks.shape != x.shape[:1]:
        raise ValueError(
            f"tasks must hold one task per row of x (rows, ..., K), got {tuple(tasks.shape)} for x of {tuple(x.shape)}"
        )
    check_device("tasks", tasks, "x", x)


def _check_values(tasks: Tensor, masks: Sequence[Tensor]) -> None:
    """Raise unless tasks on the CPU are -1 or the place of a mask. On an accelerator this would wait for the device."""
    if tasks.device.type == "cpu" and tasks.numel():
        low, high = (int(value) for value in tasks.aminmax())
        if low < -1 or high >= len(masks):
            raise ValueError(
                f"tasks must be -1 or the index of one of {len(masks)} masks, got values from {low} to {high}"
            )


# ---------------------------------------------------------------------------------------------- the ops' definitions


def _check(call: Any) -> Any:
    check_linear(call)
    _check_masks(call.masks, call.weight)
    _check_tasks(call.tasks, call.x)
    return call


def _product(call: Any) -> Tensor:
    _check_values(call.tasks, call.masks)
    return served.product(call, call.weight, KeepByTask(call.masks, call.tasks))


class _ToTokens(Gradient):
    def save(self, ctx: Any, call: Any) -> None:
        ctx.backend = call.backend
        ctx.save_for_backward(call.weight, call.tasks, *call.masks)

    def backward(self, ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
        weight, tasks, *masks = unchanged(ctx)
        d_x = _MANY_BACKWARD(grad_output, weight, masks, tasks, ctx.backend) if ctx.needs_input_grad[0] else None
        return d_x, None, [None] * len(masks), None, None, None


_MANY_BACKWARD = Op(
    "masked_linear_many_backward",
    lambda call: served.d_x(call, call.weight, KeepByTask(call.masks, call.tasks)),
    is_gradient=True,
)
_MANY = Op("masked_linear_many", _product, check=_check, gradient=_ToTokens(), short=True)
