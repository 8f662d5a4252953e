"""Layers with many masks on one weight, and the two kinds of choice: one task for all rows, or one task per row."""

import copy
import threading
from collections.abc import Iterable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mft_kernels import masked_linear_many, masked_linear_packed
from mft_kernels.internal import MOST_MASKS

#: Maximum number of tokens for masked_linear_many on an accelerator, where it multiplies all tokens by each mask.
_FEW_TOKENS = 64


def product(x: Tensor, weight: Tensor, packed: Tensor | None, bias: Tensor | None) -> Tensor:
    """Compute the linear layer with one packed mask for all of x, or unmasked if packed is None."""
    return F.linear(x, weight, bias) if packed is None else masked_linear_packed(x, weight, packed, bias)


class BankedLayer(nn.Module):
    """A frozen weight and bias with one packed mask per task. Subclasses define the forward."""

    masks_weight = True  # see mft_kernels/layers/maskable.py

    def __init__(self, weight: Tensor, bias: Tensor | None, choice: "ContextVar[Choice]") -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach(), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        # The dict is replaced, never changed: another thread may be reading it.
        self.masks: Mapping[str | None, Tensor] = {}
        self.tasks: frozenset[str] = frozenset()  # every task of the model's bank, also those that mask other layers
        self._choice = choice

    def choice(self) -> "Choice":
        """Return the choice that bank.use made for this thread. Raises: RuntimeError outside bank.use."""
        choice = self._choice.get(None)
        if choice is None:
            raise RuntimeError(
                "a model with a bank of masks must be called under bank.use(task), in the thread that calls it, got no "
                "task; bank.use(None) is the bare base"
            )
        return choice

    def check_tasks(self, tasks: Iterable[str | None]) -> None:
        """Raise ValueError for a task that was added to the bank after this model, or this copy of it, was made."""
        unknown = [task for task in tasks if task is not None and task not in self.tasks]
        if unknown:
            raise ValueError(
                f"task must be one that this copy of the bank's model holds ({', '.join(sorted(self.tasks))}), got "
                f"{unknown[0]!r}: bank.add changes bank.model alone, so copy that again"
            )

    def __deepcopy__(self, memo: dict) -> Any:
        """Copy the layer with its current masks. The same bank's ``use`` chooses the copy's task too."""
        memo[id(self._choice)] = self._choice  # a ContextVar cannot be copied
        made = memo[id(self)] = type(self).__new__(type(self))
        made.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return made

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self.masks = {task: fn(packed) for task, packed in self.masks.items()}
        return self


class BankedLinear(BankedLayer):
    """y = x @ where(mask, weight, 0).T + bias with the mask of the task in use; dense if the task has no mask here.

    Shapes: weight (N, K), bias (N,), both frozen; each task's mask int32 (N, ceil(K / 32)); x (..., K).
    """

    def __init__(self, linear: nn.Linear, choice: "ContextVar[Choice]") -> None:
        super().__init__(linear.weight, linear.bias, choice)
        self.out_features, self.in_features = linear.weight.shape
        self.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        return self.choice().product(self, x)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"tasks={list(self.masks)}"
        )


class OneTask:
    """The same task for all rows, or None for the bare base."""

    def __init__(self, task: str | None) -> None:
        self.tasks: tuple[str | None, ...] = (task,)

    def product(self, layer: BankedLinear, x: Tensor) -> Tensor:
        layer.check_tasks(self.tasks)
        return product(x, layer.weight, layer.masks.get(self.tasks[0]), layer.bias)


class TaskPerRow:
    """Row i of the batch uses tasks[i], with one pass over the weight for all rows, or one product per group of rows.

    One pass serves up to MOST_MASKS masks, and on CUDA up to _FEW_TOKENS tokens. A group is the rows of one task.
    For each layer, rows with the bare base or with a task that does not mask the layer form one group.
    """

    def __init__(self, tasks: tuple[str | None, ...], argument: str = "tasks") -> None:
        self.tasks = tasks
        self._argument = argument  # the user's name for tasks, for messages
        self._input = threading.local()  # two calls under one choice may run in different threads
        self._groups: dict[tuple, Groups] = {}  # cached by (masking tasks, device); layers share entries

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Input shape (rows, tokens, ...) of the running module that flattens rows, () outside; see note_shapes."""
        return getattr(self._input, "shape", ())

    @input_shape.setter
    def input_shape(self, shape: tuple[int, ...]) -> None:
        self._input.shape = shape

    def product(self, layer: BankedLinear, x: Tensor) -> Tensor:
        layer.check_tasks(self.tasks)
        return self.mixed_product(x, layer.weight, layer.masks, layer.bias)

    def mixed_product(
        self, x: Tensor, weight: Tensor, masks: Mapping[str | None, Tensor], bias: Tensor | None
    ) -> Tensor:
        """Compute (rows, ..., K) -> (rows, ..., N) with weight (N, K) and the masks of the rows' tasks, if any."""
        if x.dim() == 2 and self.has_flattened(len(x)):
            return self.mixed_product(x.unflatten(0, self.input_shape[:2]), weight, masks, bias).flatten(0, 1)
        if not self.fit(x.shape):
            raise self.refusal(x.shape)
        groups = self.groups(frozenset(masks), x.device)
        if len(groups.tasks) == 1:
            return product(x, weight, masks.get(groups.tasks[0]), bias)
        if len(groups.masked) <= MOST_MASKS and (not x.is_cuda or x.shape[:-1].numel() <= _FEW_TOKENS):
            each = [masks[task] for task in groups.masked]
            return masked_linear_many(x, weight, each, groups.places, bias)
        ordered = x.index_select(0, groups.order)
        parts = [
            product(part, weight, masks.get(task), bias)
            for task, part in zip(groups.tasks, ordered.split(groups.sizes))
        ]
        return torch.cat(parts).index_select(0, groups.inverse)

    def fit(self, shape: Sequence[int]) -> bool:
        """Return whether an input of this shape has one row for each task."""
        return len(shape) >= 3 and shape[0] == len(self.tasks)

    def has_flattened(self, count: int) -> bool:
        """Return whether ``count`` is the number of tokens of all rows together, flattened."""
        return self.fit(self.input_shape) and count == self.input_shape[0] * self.input_shape[1]

    def refusal(self, shape: Sequence[int]) -> ValueError:
        """Return the error for an input of this shape, whose rows do not match the tasks."""
        return ValueError(
            f"{self._argument} must have one entry per row of a batch (rows, ..., K), got {len(self.tasks)} of them "
            f"and an input of {tuple(shape)}: repeat a task for each beam and returned sequence; if the model "
            "flattens rows, use one task per batch"
        )

    def groups(self, masked: frozenset[str | None], device: torch.device) -> "Groups":
        """Return the groups of rows for a layer that the tasks in ``masked`` mask."""
        if (masked, device) not in self._groups:
            rows: dict[str | None, list[int]] = {}
            for row, task in enumerate(self.tasks):
                rows.setdefault(task if task in masked else None, []).append(row)
            order = torch.tensor([row for group in rows.values() for row in group], device=device)
            used: list[str | None] = [task for task in rows if task is not None]
            places = [used.index(task) if task in masked else -1 for task in self.tasks]
            self._groups[masked, device] = Groups(
                list(rows),
                [len(group) for group in rows.values()],
                order,
                order.argsort(),
                used,
                torch.tensor(places, device=device),
            )
        return self._groups[masked, device]


Choice = OneTask | TaskPerRow  # which masks the rows of a batch take


@dataclass(frozen=True)
class Groups:
    """Rows grouped by task.

    tasks and sizes: each group's task and number of rows. order: row numbers, group after group; inverse: its inverse
    permutation. masked and places: the tasks that mask the layer, and each row's index among them or -1; see
    masked_linear_many.
    """

    tasks: list[str | None]
    sizes: list[int]
    order: Tensor
    inverse: Tensor
    masked: list[str | None]
    places: Tensor
