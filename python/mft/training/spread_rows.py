"""Write and read tensors that are spread over processes by rows, with torch.distributed.checkpoint and safetensors.

    shard-00001-model-00001-of-00001.safetensors    rows of the first process, and their place in the whole tensor
    shard-00002-model-00001-of-00001.safetensors    rows of the second process

The files can be read with another number of processes than wrote them. No pickle is written or read.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed.checkpoint as distributed
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

ROWS = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")


def write_rows(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Write DTensors into folder; every process must call this. Raises: OSError in all if one cannot write."""
    writer = distributed.HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        distributed.save(dict(tensors), storage_writer=writer)
    except CheckpointException as error:
        raise OSError(_error_message(folder, "written", error)) from None


def read_rows(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Read DTensors in place from folder; every process must call this. Raises: OSError in all if one cannot read."""
    try:
        distributed.load(dict(tensors), storage_reader=distributed.HuggingFaceStorageReader(str(folder)))
    except CheckpointException as error:
        raise OSError(_error_message(folder, "read", error)) from None


def shapes_in(folder: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Return the shape and dtype of every whole tensor in folder's files."""
    found = distributed.HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    known = {name: of for name, of in found.items() if isinstance(of, TensorStorageMetadata)}
    return {name: (of.size, of.properties.dtype) for name, of in known.items()}


def _error_message(folder: Path, what: str, error: CheckpointException) -> str:
    rank, (reason, _) = next(iter(error.failures.items()))
    return (
        f"{folder}: the rows of process {rank} could not be {what} ({reason}): check the disk, which all processes "
        "must share"
    )
