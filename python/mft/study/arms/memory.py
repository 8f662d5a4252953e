"""What must be in memory while an arm trains, in bytes: its start's weights, and what is trained with its optimiser.

Activations come on top, which are alike in arms of the same layers (mft estimate counts them), and a teacher's weights.
"""

import math
from collections.abc import Iterable

from mft.config import MaskConfig, TrainConfig
from mft.number_formats import MOMENT_FORMATS, SCORE_FORMATS
from mft.study.arms.job import arm_of, rank_of
from mft.study.arms.size import adapter_sides, shapes_of, weights_bytes
from mft.study.config import CONTROL, LORA, MASK
from mft.study.outcome import Unit
from mft.study.workspace import Workspace

ADAPTER_BYTES = 4 + 4 + 8.0  # a number of an adapter, its gradient, two moments: all fp32
_FP32_BYTES = 4 + 8.0  # beside a weight of fp32: its gradient and two moments
_NARROW_BYTES = 4 + 4 + 8.0  # beside one of 16 bits: an fp32 master too (engines/master_weights.py)


def training_bytes(workspace: Workspace, unit: Unit) -> int:
    """Of a trained arm; where it begins over codes, its start in codes, which its model here is only equal to."""
    study, arm = workspace.study, arm_of(workspace, unit)
    codes = study.codes_under(unit.arm)
    weights = weights_bytes(workspace, None if codes is None else study.arms[codes].quantization)
    if arm.kind == MASK:
        scores = sum(map(math.prod, shapes_of(workspace, arm)))
        return weights + int(score_bytes(study.mask_of(arm), study.stage) * scores)
    if arm.kind == LORA:
        return weights + int(ADAPTER_BYTES * rank_of(workspace, unit) * adapter_sides(shapes_of(workspace, arm)))
    parameters = list(workspace.base.parameters())
    trained = sum(map(math.prod, shapes_of(workspace, arm))) if arm.kind == CONTROL else sum(map(_numel, parameters))
    return weights + int(trained * (_FP32_BYTES if parameters[0].itemsize == 4 else _NARROW_BYTES))


def score_bytes(mask: MaskConfig, train: TrainConfig) -> float:
    """A score, its gradient and its two moments."""
    return 2 * SCORE_FORMATS[mask.scores_dtype].bytes + MOMENT_FORMATS[train.moments].bytes


def equal_memory_rank(shapes: Iterable[tuple[int, ...]], score: float = ADAPTER_BYTES) -> int:
    """The largest rank whose adapters take no more memory in training than the weights' scores; 1 at the least.

    rank * sum(N + K) * 16 <= sum(N * K) * score: that of a square weight is half of its side, with fp32 scores.

    Args: shapes: (N, K) of each weight, or (E, N, K). score: bytes a score, see score_bytes.
    """
    shapes = list(shapes)
    scores = score * sum(map(math.prod, shapes))
    return max(1, int(scores // (ADAPTER_BYTES * adapter_sides(shapes))))


def _numel(parameter) -> int:
    return parameter.numel()
