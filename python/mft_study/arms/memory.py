"""Bytes in memory while an arm trains, except activations and a teacher: the start, what is trained, its optimiser."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mft.config import MaskConfig, TrainConfig
from mft.number_formats import MOMENT_FORMATS, SCORE_FORMATS, unless_auto

if TYPE_CHECKING:
    from torch import nn

ADAPTER_BYTES = 4 + 4 + 8.0  # per number of an adapter: itself, its gradient and two moments, all fp32
_FP32_BYTES = 4 + 8.0  # besides an fp32 weight: its gradient and two moments
_NARROW_BYTES = 4 + 4 + 8.0  # besides a 16-bit weight: an fp32 master too (engines/master_weights.py)


def trained_weight_bytes(base: nn.Module, numbers: int) -> int:
    """Return the bytes that training needs besides these weights of the base model. numbers: how many weights."""
    return int(numbers * (_FP32_BYTES if next(base.parameters()).itemsize == 4 else _NARROW_BYTES))


def score_bytes(mask: MaskConfig, train: TrainConfig) -> float:
    """Return the bytes per score: the score, its gradient and its two moments."""
    return 2 * SCORE_FORMATS[unless_auto(mask.scores_dtype)].bytes + MOMENT_FORMATS[unless_auto(train.moments)].bytes
