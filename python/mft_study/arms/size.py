"""What an arm must store besides the model that it started from, in bytes.

A number counts 16 bits, whatever dtype it was trained in. A mask counts the bytes of its entropy-coded export, and so
do the positions of the weights that a compressed arm changes.

Arms in fp32 are evaluated without rounding. In the study of moe.yaml, on 64 rows of validation, rounding to bfloat16
moved the loss by:

    a control, its weights                                   0.00006 nats per token
    a control, differences from the start (as many bytes)    0.00002
    LoRA of rank 8                                           0.000006
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

NUMBER = 2


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
