"""The rows of each step: a data set's rows in an order drawn from train.seed, or a stream's rows as they come."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy
import torch
from torch import Tensor

from mft.config import TrainConfig
from mft.data.batches import MicroBatch, count_labels, make_batch, take_rows
from mft.data.streams import StreamedRow, StreamedRows
from mft.engines.distributed import Processes

_CHUNK = 1024  # rows whose labels are counted together


class _Numbered:
    """Every row of a data set once per epoch, with a new order in each epoch."""

    def __init__(self, dataset: Any, train: TrainConfig, processes: Processes) -> None:
        self.count = len(dataset)
        self._dataset, self._train, self._processes = dataset, train, processes
        self._numbers = _row_numbers(len(dataset), train.seed)

    def first(self) -> Tensor:
        """Return input_ids (1, T) of some row."""
        return take_rows(self._dataset, [0]).input_ids

    def heaviest(self) -> MicroBatch | None:
        """Return a micro-batch that needs at least as much memory as any later one; None if all need the same."""
        numbers = range(len(self._dataset))
        chunks = [list(numbers[start : start + _CHUNK]) for start in range(0, len(numbers), _CHUNK)]
        scored = torch.cat([count_labels(take_rows(self._dataset, rows).labels) for rows in chunks])
        if scored.min() == scored.max():
            return None
        most = scored.argsort(descending=True)[: self._train.batch_size].tolist()
        return take_rows(self._dataset, most)

    def go_on(self, done: int, state: Mapping[str, Any] | None, recall: Callable[[list[MicroBatch]], None]) -> None:
        """Move to the position after ``done`` steps, whose state() is given. recall: see Runner.recall."""
        epoch = len(self._dataset) / (self._train.batch_size * self._train.accumulation)
        for step in range(1, done + 1):
            micro_batches = self._micro_batches()
            if step <= epoch + 1 or self._processes.count > 1:  # later rows have all been seen
                recall(self._take(micro_batches))  # in the same groups as before: the last bits may depend on them

    def next_step(self) -> list[MicroBatch]:
        """Return the micro-batches of the next step that this process runs."""
        return self._take(self._micro_batches())

    def state(self) -> dict[str, Any] | None:
        """Return what a checkpoint keeps for go_on; None if the number of steps is enough."""
        return None

    def _micro_batches(self) -> list[list[int]]:
        size, count = self._train.batch_size, self._train.accumulation
        return [[next(self._numbers) for _ in range(size)] for _ in range(count)]

    def _take(self, micro_batches: list[list[int]]) -> list[MicroBatch]:
        return [take_rows(self._dataset, rows) for rows in self._processes.share(micro_batches)]


class _Streamed:
    """Rows of a stream. All processes read the whole stream, so they take the rows that a single process would."""

    count = None

    def __init__(self, rows: StreamedRows, train: TrainConfig, processes: Processes) -> None:
        self._rows, self._train, self._processes = rows, train, processes

    def first(self) -> Tensor:
        return _batch([(0, self._rows.peek(1)[0])]).input_ids

    def heaviest(self) -> MicroBatch | None:
        """Return a micro-batch whose tokens are all scored, because the rows to come are unknown."""
        ids = self.first().expand(self._train.batch_size, -1)
        return MicroBatch([0] * len(ids), ids, ids, [0] * len(ids))

    def go_on(self, done: int, state: Mapping[str, Any] | None, recall: Callable[[list[MicroBatch]], None]) -> None:
        if done and state is None:
            raise ValueError(
                "the checkpoint must hold the position of its stream of rows, and does not: start the run again"
            )
        if state is not None:
            self._rows.restore(state)

    def next_step(self) -> list[MicroBatch]:
        size, count = self._train.batch_size, self._train.accumulation
        rows = [[next(self._rows) for _ in range(size)] for _ in range(count)]
        return [_batch(some) for some in self._processes.share(rows)]

    def state(self) -> dict[str, Any] | None:
        return self._rows.state()


RowSource = _Numbered | _Streamed  # of train_loop's steps. count: the number of different rows, or None if unknown


def open_rows(dataset: Any, train: TrainConfig, processes: Processes) -> RowSource:
    """Return the row source of a data set or a stream. Raises: ValueError if dataset holds no row."""
    if isinstance(dataset, StreamedRows):
        return _Streamed(dataset, train, processes)
    if len(dataset) == 0:
        raise ValueError("dataset must hold at least one row to train on, got 0")
    return _Numbered(dataset, train, processes)


def _batch(rows: list[tuple[int, StreamedRow]]) -> MicroBatch:
    numbers, found = [number for number, _ in rows], [row for _, row in rows]
    ids, labels = (
        torch.from_numpy(numpy.stack([getattr(row, name) for row in found]).astype(numpy.int64))
        for name in ("input_ids", "labels")
    )
    documents, starts = [row.document for row in found], [row.starts for row in found]
    return make_batch(numbers, ids, labels, documents, starts, [row.source for row in found if row.source])


def _row_numbers(count: int, seed: int) -> Iterator[int]:
    """Yield every row number once per epoch, with a new order in each epoch."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(count, generator=generator).tolist()
