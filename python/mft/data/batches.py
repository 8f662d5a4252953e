"""Rows of a data set as tensors, and the positions in them whose next token is scored."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from mft.checks import shown

_WIDTHS = 8  # rows are cut to multiples of this, to keep the number of shapes small


@dataclass(frozen=True)
class Labelled:
    """The scored next tokens of a batch: positions (M,) among its B * T tokens, and the target tokens (M,)."""

    positions: Tensor
    targets: Tensor

    def to(self, device: torch.device) -> "Labelled":
        return Labelled(self.positions.to(device), self.targets.to(device))


def find_labelled(labels: Tensor) -> Labelled:
    """Return the scored positions of labels (B, T). Token t predicts label t + 1; -100 is not scored."""
    shifted = F.pad(labels[:, 1:], (0, 1), value=-100).reshape(-1)
    positions = (shifted != -100).nonzero().squeeze(-1)
    return Labelled(positions, shifted[positions])


@dataclass(eq=False)
class MicroBatch:
    """Rows of a data set: their numbers, input_ids and labels (B, T) on the CPU, and document numbers.

    position_ids (B, T): 0 where an example starts, or None if no row holds more than one.
    sources: the rows' source names in a mix, otherwise empty.
    """

    rows: list[int]
    input_ids: Tensor
    labels: Tensor
    documents: list[int]
    position_ids: Tensor | None = None
    sources: Sequence[str] = ()

    def inputs(self, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """Return input_ids and position_ids on this device."""
        positions = self.position_ids
        return self.input_ids.to(device), None if positions is None else positions.to(device)

    def positions_without_padding(self) -> Tensor:
        """Return position_ids, also for rows with one example, that restart at 0 after each row's last label."""
        places = torch.arange(self.input_ids.shape[1]).expand_as(self.input_ids)
        end = torch.where(self.labels != -100, places + 1, 0).amax(-1, keepdim=True)
        positions = places if self.position_ids is None else self.position_ids
        return torch.where(places < end, positions, places - end)

    @cached_property
    def labelled(self) -> Labelled:
        """The positions whose next token is scored, and these tokens."""
        return find_labelled(self.labels)


def take_rows(dataset, rows: list[int]) -> MicroBatch:
    """Return the rows with these numbers. Raises: ValueError unless each row's starts rise from 0 below its length."""
    batch = dataset.with_format("torch")[rows]
    starts = [torch.as_tensor(places).tolist() for places in batch.get("starts", ())]
    return make_batch(
        rows, batch["input_ids"], batch["labels"], batch["document"].tolist(), starts, batch.get("source", ())
    )


def make_batch(
    rows: list[int],
    input_ids: Tensor,
    labels: Tensor,
    documents: list[int],
    starts: Sequence[list[int]] = (),
    sources: Sequence[str] = (),
) -> MicroBatch:
    """Make a batch of tensors (B, T). starts: as the column of a data set, or empty. Raises: as take_rows."""
    positions = None
    for row, places in zip(rows, starts):
        _check_starts(row, places, input_ids.shape[1])
    if any(len(places) > 1 for places in starts):
        positions = torch.stack([_positions(places, input_ids.shape[1]) for places in starts])
    return MicroBatch(rows, input_ids, labels, documents, positions, list(sources))


def trim_padding(batch: MicroBatch) -> MicroBatch:
    """Cut rows shortly after the last label of any row. The part that is cut does not change any scored token."""
    scored = (batch.labels != -100).any(0).nonzero()
    end = -(-(int(scored.max()) + 1) // _WIDTHS) * _WIDTHS if len(scored) else _WIDTHS
    positions = None if batch.position_ids is None else batch.position_ids[:, :end]
    return replace(batch, input_ids=batch.input_ids[:, :end], labels=batch.labels[:, :end], position_ids=positions)


def holds_packed_rows(dataset) -> bool:
    """Return whether a row holds several examples that must not see each other. Raises: as take_rows, for any row."""
    if (known := getattr(dataset, "holds_packed_rows", None)) is not None:
        return known
    if "starts" not in dataset.column_names:
        return False
    length = len(dataset[0]["input_ids"])
    starts = dataset.with_format("arrow")[:]["starts"].to_pylist()
    for row, places in enumerate(starts):
        _check_starts(row, places, length)
    return any(len(places) > 1 for places in starts)


def row_length(dataset) -> int:
    """Return the tokens of each row, padding included."""
    return getattr(dataset, "length", None) or len(dataset[0]["input_ids"])


def _positions(starts: list[int], length: int) -> Tensor:
    """Return for each token its distance from the start of its example, (T,). Padding continues the last example."""
    sizes = torch.tensor([end - start for start, end in itertools.pairwise([*starts, length])])
    return torch.arange(length) - torch.tensor(starts).repeat_interleave(sizes)


def _check_starts(row: int, starts: list[int], length: int) -> None:
    places = [*(starts or [-1]), length]
    if places[0] != 0 or any(start >= end for start, end in itertools.pairwise(places)):
        raise ValueError(
            f"starts of row {row} must begin with 0 and rise below its {length} tokens, got {shown(starts)}"
        )


def count_labels(labels: Tensor) -> Tensor:
    """Return how many tokens of each row of labels (B, T) are scored, (B,)."""
    return (labels[:, 1:] != -100).sum(-1)
