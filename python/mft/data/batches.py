"""Rows of a data set as tensors, and where in them a next token is scored."""

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Labelled:
    """Where a next token is scored: positions (M,) among the B * T of a batch, and the tokens (M,)."""

    positions: Tensor
    targets: Tensor

    def to(self, device: torch.device) -> "Labelled":
        return Labelled(self.positions.to(device), self.targets.to(device))


def find_labelled(labels: Tensor) -> Labelled:
    """Of labels (B, T): token t predicts label t + 1; -100 is none."""
    shifted = F.pad(labels[:, 1:], (0, 1), value=-100).reshape(-1)
    positions = (shifted != -100).nonzero().squeeze(-1)
    return Labelled(positions, shifted[positions])


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


def count_labels(labels: Tensor) -> Tensor:
    """(B,): how many tokens of each row of labels (B, T) are scored."""
    return (labels[:, 1:] != -100).sum(-1)
