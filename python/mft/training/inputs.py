"""Read the inputs of a command: the rows of its data, and its model on its device."""

from pathlib import Path
from typing import Any

import torch

from mft.config import ModelConfig, RunConfig
from mft.data.sources import Source, open_source
from mft.data.splits import Splits, load_splits
from mft.evaluation.evaluated_base import learned_base
from mft.models.pretrained import load_model, load_tokenizer
from mft.tracking.console import say


def read_model(config: ModelConfig) -> tuple[Any, Any]:
    """Return (model, tokenizer) from load_model, with the model on the GPU if there is one."""
    model, tokenizer = load_model(config)
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


def read_base(masks: Path, name: str | None, dtype: str | None) -> tuple[Any, Any]:
    """Return (model, tokenizer) of the base of the masks in a directory, or of name; print which base it is."""
    config, words = learned_base(masks, name, dtype)
    say(words)
    return load_model(config)


def read_data(config: RunConfig, source: Source | None = None) -> Splits:
    """Read the rows of config.data, or of ``source`` if it is open, without the model. Cheap checks come first."""
    return read_rows(config, source)[0]


def read_rows(config: RunConfig, source: Source | None = None) -> tuple[Splits, Any]:
    """Do the same as read_data, and return the tokenizer that made the rows too."""
    source = source or open_source(config.data)
    tokenizer = load_tokenizer(config.model, sequence_length=config.data.sequence_length)
    splits = load_splits(config.data, tokenizer, source, pairs=config.objective.takes_pairs)
    for note in splits.notes:
        say(note, "yellow" if note.startswith("warning: ") else "dim")
    return splits, tokenizer
