"""Mixture-of-experts modules with many masks: one task for all rows, or one task per row with one product per task.

Experts see the tokens of a batch flattened, (rows * tokens, H). Rows of different tasks mostly choose different
experts, so one product per task reads only few more weights than one product for all tasks.
"""

import functools
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mft.masks.banked_linear import BankedLayer, Choice, TaskPerRow
from mft.masks.masked_experts import (
    MaskedExperts,
    copies_of_tokens,
    experts_forward,
    mask_experts,
    project,
    unmasked_product,
)
from mft_kernels import masked_linear_grouped_packed


class BankedGroupedLinear(BankedLayer):
    """y[i] = x[i] @ where(mask[e], weight[e], 0).T + bias[e] for the rows i of expert e, with the mask of one task.

    Shapes as for MaskedGroupedLinear: weight (E, N, K), or (E, K, N) if transposed. Each task's mask is int32
    (E, N, ceil(K / 32)).
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, *, transposed: bool, choice: ContextVar[Choice]) -> None:
        super().__init__(weight, bias, choice)
        self.transposed = transposed

    def forward(self, x: Tensor, offsets: Tensor, task: str | None = None) -> Tensor:
        return grouped_product(x, self.weight, self.masks.get(task), offsets, self.bias, self.transposed)

    def extra_repr(self) -> str:
        return f"weight={tuple(self.weight.shape)}, transposed={self.transposed}, tasks={list(self.masks)}"


class BankedExperts(MaskedExperts):
    """The class of experts after bank_experts."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        layers = self.layers()
        choice = next(iter(layers.values())).choice()
        for layer in layers.values():
            layer.check_tasks(choice.tasks)
        if isinstance(choice, TaskPerRow):
            masked = frozenset(task for layer in layers.values() for task in layer.masks)
            return mixed_experts(choice, self, masked, self._task_forward, args, kwargs)
        return self._task_forward(choice.tasks[0], *args, **kwargs)

    def layers(self) -> dict[str, BankedGroupedLinear]:
        """Return the layers that hold masks, by projection name."""
        return {name: getattr(self, name) for name in self._projections}

    def _task_forward(self, task: str | None, *args: Any, **kwargs: Any) -> Tensor:
        return experts_forward(self, functools.partial(self._product, task), *args, **kwargs)

    def _product(self, task: str | None, name: str, x: Tensor, offsets: Tensor) -> Tensor:
        if name in self._projections:
            return getattr(self, name)(x, offsets, task)
        return project(self, name, x, offsets)


def bank_experts(experts: nn.Module, name: str, choice: ContextVar[Choice]) -> BankedGroupedLinear:
    """Let the parameter ``name`` of experts hold masks, in place. Return the layer that holds them."""
    return mask_experts(experts, name, functools.partial(BankedGroupedLinear, choice=choice), BankedExperts)


def grouped_product(
    x: Tensor, weight: Tensor, packed: Tensor | None, offsets: Tensor, bias: Tensor | None, transposed: bool
) -> Tensor:
    """Compute the grouped product of rows (T, K), sorted by expert, with one packed mask or unmasked (None)."""
    if packed is None:
        return unmasked_product(x, weight, offsets, bias, transposed)
    return masked_linear_grouped_packed(x, weight, packed, offsets, bias, transposed=transposed)


def note_shapes(around: nn.Module, choice: Callable[[], Any]) -> list[RemovableHandle]:
    """Record in choice(), if it is a TaskPerRow, the input shape of ``around``, which flattens rows for its experts."""

    def before(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        rows = choice()
        if isinstance(rows, TaskPerRow):
            given = (t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.is_floating_point())
            rows.input_shape = next((tuple(hidden.shape) for hidden in given), ())

    def after(module: nn.Module, args: tuple, output: Any) -> None:
        rows = choice()
        if isinstance(rows, TaskPerRow):
            rows.input_shape = ()

    return [around.register_forward_pre_hook(before, with_kwargs=True), around.register_forward_hook(after)]


def mixed_experts(
    rows: TaskPerRow,
    experts: nn.Module,
    masked: frozenset[str | None],
    of_task: Callable[..., Tensor],
    args: tuple,
    kwargs: Mapping[str, Any],
) -> Tensor:
    """Run experts on their forward's arguments, with each row's tokens masked by the row's task.

    Args:
        rows: its ``seen`` shape, recorded by note_shapes, tells how the tokens were flattened.
        masked: the tasks that mask these experts; all other tasks form one group, under the task None.
        of_task: (task, *args, **kwargs) -> the experts' output for some rows' tokens.
    """
    given = [*args, *kwargs.values()]
    copies, total = copies_of_tokens(experts), len(given[0])
    if not copies or total % copies or not rows.has_flattened(total // copies):
        raise rows.refusal(given[0].shape if rows.fit(rows.input_shape) else rows.input_shape or given[0].shape)
    count, tokens = rows.input_shape[:2]
    groups = rows.groups(masked, given[0].device)
    if len(groups.tasks) == 1:
        return of_task(groups.tasks[0], *args, **kwargs)

    def chosen(tensor: Tensor, which: Tensor) -> Tensor:
        """Return the part of a tensor (copies * rows * tokens, ...) that belongs to the rows ``which``."""
        apart = tensor.reshape(copies, count, tokens, *tensor.shape[1:])
        return apart.index_select(1, which).flatten(0, 2)

    parts = []
    for task, which in zip(groups.tasks, groups.order.split(groups.sizes)):
        some = [chosen(tensor, which) for tensor in given]
        found = of_task(task, *some[: len(args)], **dict(zip(kwargs, some[len(args) :])))
        parts.append(found.view(copies, len(which), tokens, *found.shape[1:]))
    return torch.cat(parts, 1).index_select(1, groups.inverse).flatten(0, 2)
