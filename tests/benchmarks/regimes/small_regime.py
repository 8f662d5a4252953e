"""Texts of counting words, and a base model from scratch that a test can train."""

import json

from mft.config import DataConfig, TrainConfig
from mft_study.config import ScratchConfig


def counting(directory, name, step):
    """Write a JSONL file of 40 lines in which words of two letters count by ``step``."""
    path = directory / f"{name}.jsonl"
    words = [first + second for first in "abcdefg" for second in "hijklmn"]
    lines = [name + " ".join(words[(i * 7 + step * j) % len(words)] for j in range(30)) for i in range(40)]
    path.write_text("\n".join(json.dumps({"text": line}) for line in lines) + "\n")
    return DataConfig(source=str(path), sequence_length=16, max_train_tokens=128, max_eval_tokens=128)


def scratch(directory):
    """Return the configuration of a model with two layers of width 16, trained for two steps."""
    return ScratchConfig(
        vocab_size=280,
        hidden_size=16,
        intermediate_size=32,
        layers=2,
        heads=2,
        data=counting(directory, "base", 1),
        train=TrainConfig(lr=5e-3, steps=2, batch_size=4),
    )
