"""What must be in memory while an arm trains, in bytes: its start's weights, and what is trained with its optimiser.

Activations come on top, which are alike in arms of the same layers (mft estimate counts them), and a teacher's weights.
"""

import math
from collections.abc import Iterable

from torch import nn

from mft.config import MaskConfig, TrainConfig
from mft.number_formats import MOMENT_FORMATS, SCORE_FORMATS, unless_auto
from mft.study.arms.size import adapter_sides

ADAPTER_BYTES = 4 + 4 + 8.0  # a number of an adapter, its gradient, two moments: all fp32
_FP32_BYTES = 4 + 8.0  # beside a weight of fp32: its gradient and two moments
_NARROW_BYTES = 4 + 4 + 8.0  # beside one of 16 bits: an fp32 master too (engines/master_weights.py)


def trained_weight_bytes(base: nn.Module, numbers: int) -> int:
    """Beside so many weights of the base model that are trained."""
    return int(numbers * (_FP32_BYTES if next(base.parameters()).itemsize == 4 else _NARROW_BYTES))


def score_bytes(mask: MaskConfig, train: TrainConfig) -> float:
    """A score, its gradient and its two moments."""
    return 2 * SCORE_FORMATS[unless_auto(mask.scores_dtype)].bytes + MOMENT_FORMATS[unless_auto(train.moments)].bytes


def equal_memory_rank(shapes: Iterable[tuple[int, ...]], score: float = ADAPTER_BYTES) -> int:
    """The largest rank whose adapters take no more memory in training than the weights' scores; 1 at the least.

    rank * sum(N + K) * 16 <= sum(N * K) * score: that of a square weight is half of its side, with fp32 scores.

    Args: shapes: (N, K) of each weight, or (E, N, K). score: bytes a score, see score_bytes.
    """
    shapes = list(shapes)
    scores = score * sum(map(math.prod, shapes))
    return max(1, int(scores // (ADAPTER_BYTES * adapter_sides(shapes))))
