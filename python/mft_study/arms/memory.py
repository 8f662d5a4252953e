"""Bytes in memory while an arm trains, except activations and a teacher: the start, what is trained, its optimiser."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

from mft.config import MaskConfig, TrainConfig
from mft.number_formats import MOMENT_FORMATS, SCORE_FORMATS, unless_auto
from mft_study.arms.size import adapter_sides

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


def equal_memory_rank(shapes: Iterable[tuple[int, ...]], score: float = ADAPTER_BYTES) -> int:
    """Return the largest rank, at least 1, with rank * sum(N + K) * 16 <= sum(N * K) * score, bytes per score.

    Its adapters then need no more memory in training than the scores of weights (N, K) or (E, N, K).
    """
    shapes = list(shapes)
    scores = score * sum(map(math.prod, shapes))
    return max(1, int(scores // (ADAPTER_BYTES * adapter_sides(shapes))))
