"""Serve many masks on one base model, chosen per request or per row. Each task's masks take 1 bit per weight.

    bank = load_mask_bank(model, {"code": "runs/code", "math": "runs/math"})
    with bank.use("code"):
        model.generate(...)
    with bank.use(["code", "math", None]):  # one task for each row of the batch; None: the bare base
        model(...)

For inference only: packed masks are not trained, and weights are frozen.
"""

import contextlib
import functools
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from mft.checks import nearest
from mft.masks.banked_experts import bank_experts, note_shapes
from mft.masks.banked_linear import BankedLayer, BankedLinear, Choice, OneTask, TaskPerRow
from mft.masks.convert import as_linear, check_unmasked, check_unwrapped, replace_module, split_attentions
from mft.masks.export import read_learned
from mft.masks.export_format import check_masks_alone, read_description
from mft.masks.location import masks_directory
from mft.masks.masked_experts import share_experts
from mft.models.linears import find_targets
from mft.models.routed_experts import expert_projections


def load_mask_bank(
    model: nn.Module, directories: Mapping[str, str | os.PathLike], *, force: bool = False
) -> "MaskBank":
    """Put the masks of several exports on one model, in place.

    Tasks may mask different layers; a layer that a task does not mask runs dense for that task. Weights are shared, not
    copied, except that GPT-2's Conv1D weights are copied as transposed. The weights are exact, also for masks that were
    learned on a quantised base.

    Args:
        model: the base that all the masks were learned on, ordinary and unmasked.
        directories: for each task's name, a directory of save_masks, a run of mft train, or a Hub repository as for
            load_masks.
        force: accept other base weights of the same shapes.
    Raises: the errors of load_masks; the model is then unchanged.
    """
    bank = MaskBank(model)
    read = {}
    for task, directory in directories.items():
        bank._check_new(task)
        read[task] = bank.read(directory, force=force)
    for task, masks in read.items():
        bank.put(task, masks)
    return bank


class MaskBank:
    """The tasks whose masks a model holds, and the choice of the task in use.

    Threads may call the model with different tasks at the same time, and add tasks meanwhile. A choice holds only in
    the thread or asyncio task that made it, and calling the model without a choice is an error.
    """

    def __init__(self, model: nn.Module) -> None:
        check_unwrapped(model)
        check_unmasked(model)
        self.model = model
        held = self._layers()
        if held:
            raise ValueError(f"model must not hold a bank of masks already, got {len(held)} layers with one: add to it")
        self._tasks: list[str] = []
        self._in_use: Counter[str] = Counter()
        self._noting: set[str] = set()  # modules around experts that note their input's shape, by name
        self._lock = threading.RLock()
        self._choice: ContextVar[Choice] = ContextVar("mft.MaskBank")

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks' names, in the order in which they were added."""
        return tuple(self._tasks)

    @contextlib.contextmanager
    def use(self, tasks: str | Sequence[str | None] | None) -> Iterator[None]:
        """Make the model's calls in this context use the masks of a task; None selects the bare base.

        If tasks is a sequence, row i of the batch uses the masks of tasks[i]; TaskPerRow says at what cost. The inputs
        of masked layers must then have shape (rows, ..., K), as in most models; so must the input of the module around
        experts. Beams and num_return_sequences count as rows, next to each other.
        Raises: TypeError or ValueError if tasks has another type or names an unknown task. The model's call raises
            ValueError if the batch has another number of rows.
        """
        one = tasks is None or isinstance(tasks, str)
        if not one and not isinstance(tasks, Iterable):
            raise TypeError(
                f"tasks must be a task's name, a list with one name per row of the batch, or None, got {tasks!r}"
            )
        each: tuple[Any, ...] = (tasks,) if one else tuple(tasks or ())
        with self._lock:
            for task in each:
                if task is not None:
                    self._check_known(task)
            named = set(each) - {None}
            self._in_use.update(named)
        before = self._choice.set(OneTask(each[0]) if one else TaskPerRow(each))
        try:
            yield
        finally:
            self._choice.reset(before)
            with self._lock:
                self._in_use.subtract(named)

    def add(self, task: str, directory: str | os.PathLike, *, force: bool = False) -> None:
        """Add a task. Arguments and errors are those of load_mask_bank."""
        self._check_new(task)
        self.put(task, self.read(directory, force=force))

    def read(self, directory: str | os.PathLike, *, force: bool = False) -> dict[str, Tensor]:
        """Return an export's packed masks by layer, for put. All slow or failing work is here. Errors as for add."""
        path = masks_directory(directory)
        export = read_description(path)
        check_masks_alone(export, path, "a bank, because its tasks share everything but the masks")
        modules, names = dict(self.model.named_modules()), [entry.name for entry in export.modules]
        find_targets(self.model, [name for name in names if not isinstance(modules.get(name), BankedLayer)])
        return read_learned(self.model, export, path, force=force)[0]

    def put(self, task: str, masks: Mapping[str, Tensor]) -> None:
        """Add a task with the masks that read returned. Raises: ValueError if the name is taken."""
        with self._lock:
            self._check_new(task)
            split_attentions(self.model, masks)
            for name, packed in masks.items():
                layer = self._banked(name)
                layer.masks = {**layer.masks, task: packed.to(layer.weight.device)}
            self._tasks.append(task)
            for layer in self._layers():
                layer.tasks = frozenset(self._tasks)

    def union(self, *tasks: str, name: str | None = None) -> str:
        """Add a task that keeps every weight that any of these tasks keeps, and return its name.

        A layer that one of them does not mask keeps every weight. The union stays if these tasks are removed.
        Args: name: the new task's name; by default "a | b".
        Raises: ValueError for fewer than two tasks, an unknown task, or a name that is taken.
        """
        return self._combine(tasks, name, " | ", torch.bitwise_or, whole_wins=True)

    def intersection(self, *tasks: str, name: str | None = None) -> str:
        """Add a task that keeps the weights that all of these tasks keep; as union, but named "a & b" by default.

        A layer that only some of the tasks mask gets the intersection of their masks.
        """
        return self._combine(tasks, name, " & ", torch.bitwise_and, whole_wins=False)

    def remove(self, task: str) -> None:
        """Free a task's masks. Raises: ValueError if it is unknown, RuntimeError while a call may be using it."""
        with self._lock:
            self._check_known(task)
            if self._in_use[task]:
                raise RuntimeError(f"task must not be in use when it is removed, got {task!r}: leave bank.use first")
            self._tasks.remove(task)
            del self._in_use[task]
            for layer in self._layers():
                layer.masks = {name: packed for name, packed in layer.masks.items() if name != task}
                layer.tasks = frozenset(self._tasks)

    def nbytes(self) -> dict[str, int]:
        """Return the bytes of each task's masks."""
        with self._lock:
            layers = self._layers()
            return {task: sum(each.masks[task].nbytes for each in layers if task in each.masks) for task in self._tasks}

    def print_memory(self) -> None:
        """Print the bytes of the base and of each task's masks, compared with one merged model per task."""
        base = sum(tensor.nbytes for tensor in (*self.model.parameters(), *self.model.buffers()))
        masks = self.nbytes()
        each = ", ".join(f"{task} {size:,d} ({100 * size / base:.2f} %)" for task, size in masks.items())
        print(
            f"base: {base:,d} bytes || masks: {each or 'none'} || together: {base + sum(masks.values()):,d} || "
            f"as {len(masks)} merged models: {base * len(masks):,d}"
        )

    def _banked(self, name: str) -> BankedLayer:
        """Return the layer of this name, replaced by one that can hold masks: other threads may compute with it."""
        path, _, part = name.rpartition(".")
        parent: Any = self.model.get_submodule(path)
        layer: Any = parent._modules.get(part)
        if isinstance(layer, BankedLayer):
            return layer
        if part not in expert_projections(parent):
            layer = BankedLinear(as_linear(layer), self._choice)
            layer.tasks = frozenset(self._tasks)
            replace_module(self.model, name, layer)
            return layer
        experts = share_experts(parent)
        layer = bank_experts(experts, part, self._choice)
        layer.tasks = frozenset(self._tasks)
        around = path.rpartition(".")[0]  # the module that contains the experts
        if around not in self._noting:
            self._noting.add(around)
            choice = self._choice
            note_shapes(self.model.get_submodule(around), lambda: choice.get(None))
        replace_module(self.model, path, experts)
        return layer

    def _combine(
        self, tasks: tuple[str, ...], name: str | None, symbol: str, join: Callable[..., Tensor], *, whole_wins: bool
    ) -> str:
        """Add a task with masks joined bitwise. whole_wins: a layer stays unmasked if any of the tasks leaves it so."""
        if len(tasks) < 2:
            raise ValueError(f"tasks must be two or more of the bank's, got {tasks}")
        with self._lock:
            for task in tasks:
                self._check_known(task)
            masks = {}
            for layer_name, layer in self.model.named_modules():
                held = [layer.masks[t] for t in tasks if t in layer.masks] if isinstance(layer, BankedLayer) else []
                if held and not (whole_wins and len(held) < len(tasks)):
                    masks[layer_name] = functools.reduce(join, held).clone()
            name = symbol.join(tasks) if name is None else name
            self.put(name, masks)
        return name

    def _check_new(self, task: Any) -> None:
        if not isinstance(task, str) or not task:
            raise ValueError(f"task must be a name, got {task!r}")
        if task in self._tasks:
            raise ValueError(f"task must be new to the bank, got {task!r}: remove it first")

    def _check_known(self, task: Any) -> None:
        if task not in self._tasks:
            raise ValueError(
                f"task must be one of the bank's ({', '.join(self._tasks) or 'none'}), got {task!r}"
                f"{nearest(str(task), self._tasks)}"
            )

    def _layers(self) -> list[BankedLayer]:
        return [module for module in self.model.modules() if isinstance(module, BankedLayer)]
