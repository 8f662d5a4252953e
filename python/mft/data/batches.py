"""Rows of a data set as tensors."""

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from mft.models.token_loss import Labelled, find_labelled


@dataclass
class MicroBatch:
    """Rows of a data set: their numbers, input_ids and labels (B, T) on the CPU, and documents."""

    rows: list[int]
    input_ids: Tensor
    labels: Tensor
    documents: list[int]

    @cached_property
    def labelled(self) -> Labelled:
        """Where a next token is scored, and which it is."""
        return find_labelled(self.labels)


def take_rows(dataset, rows: list[int]) -> MicroBatch:
    """The rows with these numbers."""
    batch = dataset.with_format("torch")[rows]
    return MicroBatch(rows, batch["input_ids"], batch["labels"], batch["document"].tolist())
