"""What an arm must store beside the model that it began at, in bytes.

Numbers count 16 bits each, whatever they were trained in; a mask, and which weights of a matrix a compressed arm
changes, what its entropy-coded export holds. Arms of fp32 are evaluated as they are: in the study of moe.yaml, on 64
rows of validation, rounding to bfloat16 moved the loss of a control by 0.00006 nats a token (its weights) or 0.00002
(their differences from the start, which take as many bytes), and that of LoRA of rank 8 by 0.000006.
"""

import math
from collections.abc import Iterable

import torch
from torch import nn

from mft.masks.quantize import coded_shapes
from mft.models.codes.weight import QuantizedWeight

NUMBER = 2


def model_numbers(model: nn.Module) -> int:
    """Of all its parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def adapter_sides(shapes: Iterable[tuple[int, ...]]) -> int:
    """What adapters of rank 1 hold on weights of these shapes; of experts in one parameter each has one."""
    return sum(math.prod(shape[:-2]) * (shape[-2] + shape[-1]) for shape in shapes)


def weights_bytes(base: nn.Module, quantization: str | None, number: float | None = None) -> int:
    """Of the whole model, its decoder layers' linears in codes of this kind (None: none); else so many bytes a number.

    number: None: as many as each has.
    """
    coded = coded_shapes(base) if quantization is not None else {}
    empty = [QuantizedWeight.empty(shape, torch.float32, str(quantization), "meta") for shape in coded.values()]
    codes = sum(each.nbytes for each in empty)
    rest = (parameter for name, parameter in base.named_parameters() if name not in coded)
    return codes + int(sum(p.numel() * (number or p.itemsize) for p in rest))
