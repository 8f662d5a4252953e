"""Bytes of an arm: what it must store besides the model that it started from, and what it needs while it trains.

To store, a number counts 16 bits, whatever dtype it was trained in. A mask counts the bytes of its entropy-coded
export, and so do the positions of the weights that a compressed arm changes.

Arms in fp32 are evaluated without rounding. In the study of moe.yaml, on 64 rows of validation, rounding to bfloat16
moved the loss by:

    a control, its weights                                   0.00006 nats per token
    a control, differences from the start (as many bytes)    0.00002
    LoRA of rank 8                                           0.000006

In memory while an arm trains are the start, what is trained, and its optimiser; activations and a teacher do not count.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mft.config import MaskConfig, TrainConfig
from mft.number_formats import MOMENT_FORMATS, SCORE_FORMATS, unless_auto

if TYPE_CHECKING:
    from torch import nn

NUMBER = 2  # bytes, to store
ADAPTER_BYTES = 4 + 4 + 8.0  # per number of an adapter: itself, its gradient and two moments, all fp32
_FP32_BYTES = 4 + 8.0  # besides an fp32 weight: its gradient and two moments
_NARROW_BYTES = 4 + 4 + 8.0  # besides a 16-bit weight: an fp32 master too (engines/master_weights.py)


def model_numbers(model: nn.Module) -> int:
    """Return how many numbers all parameters of the model have."""
    return sum(parameter.numel() for parameter in model.parameters())


def weights_bytes(base: nn.Module, quantization: str | None, number: float | None = None) -> int:
    """Return the bytes of the whole model, with the linear layers of its decoder in codes of the kind quantization.

    number: bytes per number outside the codes; None: as many as its dtype has.
    """
    import torch

    from mft.masks.quantize import coded_shapes
    from mft.models.codes.weight import QuantizedWeight

    coded = coded_shapes(base) if quantization is not None else {}
    empty = [QuantizedWeight.empty(shape, torch.float32, str(quantization), "meta") for shape in coded.values()]
    codes = sum(each.nbytes for each in empty)
    rest = (parameter for name, parameter in base.named_parameters() if name not in coded)
    return codes + int(sum(p.numel() * (number or p.itemsize) for p in rest))


def trained_weight_bytes(base: nn.Module, numbers: int) -> int:
    """Return the bytes that training needs besides these weights of the base model. numbers: how many weights."""
    return int(numbers * (_FP32_BYTES if next(base.parameters()).itemsize == 4 else _NARROW_BYTES))


def score_bytes(mask: MaskConfig, train: TrainConfig) -> float:
    """Return the bytes per score: the score, its gradient and its two moments."""
    return 2 * SCORE_FORMATS[unless_auto(mask.scores_dtype)].bytes + MOMENT_FORMATS[unless_auto(train.moments)].bytes
