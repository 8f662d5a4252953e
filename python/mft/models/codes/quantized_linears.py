"""Linear layers that hold codes instead of a weight: bitsandbytes' 4-bit layers, and QuantizedLinear.

Transformers makes bitsandbytes' layers for ``BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")``. Their
codes are used in place, not copied.
"""

from typing import Any

import torch
from torch import Tensor, nn

from mft.models.codes.weight import QuantizedWeight
from mft_kernels.internal import NESTED_BLOCK, Nf4, Nf4Dq

_REMEDY = 'load it with BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")'


def holds_codes(module: nn.Module) -> bool:
    """Return whether module is a linear layer of one of these kinds, whatever its codes are."""
    return isinstance(getattr(module, "quantized", None), QuantizedWeight) or _is_bitsandbytes(module)


def why_no_codes(module: nn.Module) -> str | None:
    """Return why codes_of cannot read a layer that holds_codes; None if it can."""
    if not _is_bitsandbytes(module):
        return None
    state = getattr(module._parameters["weight"], "quant_state", None)
    if state is None:
        name = type(module).__name__
        return f"it is a {name} of bitsandbytes whose weight is not quantised to 4 bits, or not yet: {_REMEDY}"
    if getattr(state, "packing_format_for_cpu", False):
        return "a forward pass on the CPU has repacked its codes: load the model again, and add the mask first"
    nested = state.state2.blocksize if state.nested else NESTED_BLOCK
    if (state.quant_type, state.blocksize, nested) != (Nf4.name, Nf4.block, NESTED_BLOCK) or len(state.shape) != 2:
        found = f"{state.quant_type} in blocks of {state.blocksize}"
        return f"its codes are {found}, not nf4 in blocks of {Nf4.block}: {_REMEDY}"
    return None


def codes_of(module: nn.Module) -> QuantizedWeight:
    """Return the layer's weight, sharing the memory of its codes. why_no_codes must have returned None."""
    if not _is_bitsandbytes(module):
        return module.quantized  # type: ignore[return-value]
    weight: Any = module._parameters["weight"]
    state = weight.quant_state
    shape, codes = (int(state.shape[0]), int(state.shape[1])), weight.data.view(torch.uint8)
    if not state.nested:
        return QuantizedWeight(Nf4(codes, [state.absmax], shape), state.dtype)
    nested = [state.absmax, state.state2.absmax, state.state2.code, state.offset]
    return QuantizedWeight(Nf4Dq(codes, nested, shape), state.dtype)


def set_codes(module: nn.Module, codes: Tensor) -> None:
    """Replace the layer's codes by others of the same shape. Other owners of the old codes keep them."""
    if _is_bitsandbytes(module):
        weight: Any = module._parameters["weight"]
        weight.data = codes.view(weight.dtype)
    else:
        module.quantized.codes = codes  # type: ignore[union-attr]


def _is_bitsandbytes(module: nn.Module) -> bool:
    return type(module).__module__.startswith("bitsandbytes.") and isinstance(module, nn.Linear)
