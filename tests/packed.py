"""Rows of several examples, for tests of models that must keep them apart."""

from itertools import chain

import torch
from datasets import Dataset


def words(*lengths):
    """Return examples of these lengths."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 60, (n,), generator=generator).tolist() for n in lengths]


def rows_of(*members, length):
    """Return a row for each list of examples, padded to the length; no example's first token is scored."""
    rows = {"input_ids": [], "labels": [], "starts": []}
    for examples in members:
        ids = [*chain(*examples)]
        padding = length - len(ids)
        rows["input_ids"].append(ids + [0] * padding)
        rows["labels"].append([*chain(*([-100, *each[1:]] for each in examples))] + [-100] * padding)
        rows["starts"].append([sum(map(len, examples[:i])) for i in range(len(examples))])
    return Dataset.from_dict(rows | {"document": list(range(len(members)))})
