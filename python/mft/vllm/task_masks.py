"""Apply the masks of one task at a time to the weights of a running model, and restore the base.

    weight  1.5  NaN  2.0  -0.0        mask  1  0  1  0
    becomes 1.5  0    2.0   0          held  places 1, 3 and the base's values NaN, -0.0

A switch writes the old task's values back, and zeros at the new task's places. It touches only weights that the two
masks drop. Each task keeps its own values, so any switch can be done again from any state.
"""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mft.files.weights_hash import weights_hash
from mft.masks.export_format import (
    UNVERIFIED,
    MaskExport,
    check_base,
    check_masks_alone,
    read_description,
    read_tensors,
)
from mft.masks.location import masks_directory
from mft.vllm.dropped import Dropped, nothing_dropped
from mft.vllm.mask_flips import Flips, Places, Shape, dropped_places, flipped_places
from mft.vllm.worker_errors import check_known

logger = logging.getLogger(__name__)

_MOST = 2**31  # weights of a layer, whose places are int32
Find = Callable[[str, tuple[int, ...], torch.dtype], Tensor]
Masks = dict[str, Dropped]  # by layer


class Tasks:
    """The model's weights (find: a layer's name -> (N, K)) and masks by task; those of one task are applied."""

    def __init__(self, find: Find) -> None:
        self._find = find
        self.weights: dict[str, Tensor] = {}  # of the layers that a task masks
        self._tasks: dict[str, Masks] = {}
        self._steps: dict[str, int] = {}  # next step of each task that comes as flips
        self.task: str | None = None  # the one whose masks are applied to the weights; None for the base
        self._hashes: dict[tuple[str, ...], str] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """The tasks, in the order in which they were added."""
        return tuple(self._tasks)

    def masks(self, task: str | None) -> Masks:
        """What a task drops, by layer; None: nothing. Raises: ValueError for an unknown task."""
        if task is None:
            return {}
        check_known(task, self._tasks)
        return self._tasks[task]

    @torch.no_grad()
    def add(self, directories: Mapping[str, str], *, force: bool = False) -> None:
        """Read the masks of more tasks. Raises: ValueError or OSError if one does not fit; then none is added."""
        read: dict[str, Masks] = {}
        for task, place in directories.items():
            self._check_new(task)
            directory = masks_directory(place)
            export = read_description(directory)
            check_masks_alone(export, directory, "a server, because its tasks share everything but the masks")
            read[task] = self._read(export, directory, force)
        self._tasks |= read

    @torch.no_grad()
    def use(self, task: str | None) -> int:
        """Apply this task's masks, or restore the base; return how many weights that wrote. Raises: ValueError."""
        old, before, after = self.task, self.masks(self.task), self.masks(task)
        if old == task:
            return 0
        try:
            self._switch(before, after)
            self.task = task
        except BaseException:  # also an interrupt: restore the old task
            self._switch(after, before)
            self.task = old
            raise
        return sum(len(dropped.places) for masks in (before, after) for dropped in masks.values())

    @torch.no_grad()
    def flip(self, task: str, flips: Flips) -> int:
        """Apply one step of flips (step 0 adds the task); return the bits flipped. Raises: ValueError."""
        masks = self._masks_before(task, flips)
        changed: Masks = {}
        written: Masks = {}
        for name, stream in flips.streams.items():
            if name not in masks:
                raise ValueError(
                    f"flips must be of the task's {len(masks)} masked layers, got {name!r}: begin a new task"
                )
            flipped = self._read_values(name, flipped_places(name, stream, self._shape(name)))
            changed[name], out = masks[name].flipped(flipped)
            written[name] = Dropped(flipped.places, flipped.values.masked_fill(torch.from_numpy(out), 0))
        after = masks | changed
        dropped = sum(len(each.places) for each in after.values())
        if dropped != flips.dropped:
            raise ValueError(
                f"flips of step {flips.step} must leave {flips.dropped} weights dropped, as the sender says, got "
                f"{dropped}: begin a new task"
            )
        try:
            self._store(task, after, flips.step, written)
        except BaseException:  # also an interrupt: store all of it first
            self._store(task, after, flips.step, written)
            raise
        return sum(len(each.places) for each in written.values())

    # ------------------------------------------------------------------------------------------ private

    def _switch(self, before: Masks, after: Masks) -> None:
        for name in before.keys() | after.keys():
            weight = self.weights[name]
            if name in before:
                before[name].put_back(weight)
            if name in after:
                after[name].drop(weight)

    def _read(self, export: MaskExport, directory: Path, force: bool) -> Masks:
        for entry in export.modules:
            self._weight(entry.name, entry.shape, entry.dtype)
        check_base(export, directory, self._base_hash([e.name for e in export.modules]), self._base, force=force)
        packed = read_tensors(directory, export, self._base)[0]
        if export.content_hash is None:
            logger.warning("%s: %s", directory, UNVERIFIED)
        return {name: self._read_values(name, dropped_places(mask, self._shape(name))) for name, mask in packed.items()}

    def _masks_before(self, task: str, flips: Flips) -> Masks:
        """Check flips, and return the masks that they change."""
        if flips.step == 0:
            self._check_new(task)
            for name, shape in flips.shapes.items():
                self._weight(name, shape, flips.dtypes.get(name, ""))
            found = self._base_hash(list(flips.shapes))
            if found != flips.base_hash:
                raise ValueError(
                    f"task {task!r} must be trained on the base that is served, whose masked weights have {found}, got "
                    f"{flips.base_hash}: serve that base, in that dtype"
                )
            return {name: nothing_dropped(self.weights[name]) for name in flips.shapes}
        known = self._steps.get(task)
        if known != flips.step:
            at = "is unknown" if known is None else f"is at step {known}"
            raise ValueError(
                f"flips must follow each other, got step {flips.step} of task {task!r}, which {at}: begin a new task"
            )
        return self._tasks[task]

    def _store(self, task: str, masks: Masks, step: int, written: Masks) -> None:
        """Store a task's masks after this step, and write the values of its flips if it is in use."""
        self._tasks[task], self._steps[task] = masks, step + 1
        if task == self.task:
            for name, each in written.items():
                each.put_back(self.weights[name])

    def _read_values(self, name: str, places: Places) -> Dropped:
        """Return the places with the base's values there, also while a task's masks are applied to the weight."""
        weight = self.weights[name]
        held = self.masks(self.task).get(name, nothing_dropped(weight))
        return Dropped(places, held.values_at(places, weight))

    def _base(self, name: str) -> Tensor:
        """Return the base's weight: the one in memory, or a copy without masks while masks are applied to it."""
        held = self.masks(self.task).get(name)
        if held is None:
            return self.weights[name]
        whole = self.weights[name].clone()
        held.put_back(whole)
        return whole

    def _base_hash(self, names: list[str]) -> str:
        key = tuple(sorted(names))
        if key not in self._hashes:
            self._hashes[key] = weights_hash(key, self._base)
        return self._hashes[key]

    def _weight(self, name: str, shape: tuple[int, ...], dtype: str) -> None:
        """Find a layer's weight and remember it."""
        if np.prod(shape, dtype=np.int64) >= _MOST:
            raise ValueError(
                f"{name}: a masked weight must have fewer than 2**31 elements in vLLM, got {shape}: mft merge"
            )
        known = self.weights.get(name)
        if known is None or tuple(known.shape) != shape:
            self.weights[name] = self._find(name, shape, getattr(torch, dtype, torch.float32))

    def _shape(self, name: str) -> Shape:
        rows, columns = self.weights[name].shape
        return rows, columns

    def _check_new(self, task: str) -> None:
        if not isinstance(task, str) or not task:
            raise ValueError(f"task must be a name, got {task!r}")
        if task in self._tasks:
            raise ValueError(f"task must be new to the server, got {task!r}: give it another name")
