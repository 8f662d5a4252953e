"""Rows of preference pairs: a row packs examples 2i (chosen) and 2i + 1 (rejected), which do not see each other."""

import torch
from torch import Tensor

from mft.data.batches import MicroBatch


def check_pairs(dataset, name: str) -> None:
    """Raise ValueError if a row does not hold pairs; name is the objective that needs them."""
    rule = f"dataset must hold pairs for the objective {name}, two examples each (chosen, rejected)"
    if "starts" not in dataset.column_names:
        raise ValueError(f"{rule}, got rows without starts: give data with chosen and rejected")
    for row, starts in enumerate(dataset.with_format("arrow")[:]["starts"].to_pylist()):
        if not starts or len(starts) % 2:
            raise ValueError(f"{rule}, got {len(starts)} in row {row}: give data with chosen and rejected")


def pairs_of_row(batch: MicroBatch) -> list[int]:
    """Return the number of pairs in each row."""
    assert batch.position_ids is not None, "check_pairs has seen the rows"
    return ((batch.position_ids == 0).sum(-1) // 2).tolist()


def summed_by_example(values: Tensor, batch: MicroBatch) -> tuple[Tensor, Tensor]:
    """Sum values (M,), one per scored token, over each example; return the sums (chosen (P,), rejected (P,))."""
    assert batch.position_ids is not None, "check_pairs has seen the rows"
    begins = (batch.position_ids == 0).flatten()
    examples = (begins.cumsum(0) - 1)[batch.labelled.positions]  # the example of each scored token
    sums = torch.zeros(int(begins.sum()), dtype=values.dtype, device=values.device)
    sums = sums.index_add(0, examples.to(values.device), values)
    return sums[0::2], sums[1::2]
