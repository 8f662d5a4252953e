"""Find weights whose memory is not their model's alone. They are copied before a mask is written into them."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mft.files.mapped import Mappings
from mft.models.attached import attach, attached
from mft_kernels import MaskedLayer


def layers_to_copy(model: nn.Module, masked: Mapping[str, MaskedLayer]) -> set[str]:
    """Return the layers whose weight is mapped from a file, or shared with processes, other modules or models."""
    if attached(model).shares_memory:
        return set(masked)
    mappings = Mappings()
    others = [
        (module, *_span(tensor))
        for module in model.modules()
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False))
    ]
    found = set()
    for name, layer in masked.items():
        weight = layer.weight
        device, start, end = _span(weight)
        tied = any(
            module is not layer and other == device and start < its_end and its_start < end
            for module, other, its_start, its_end in others
        )
        if tied or (weight.is_cpu and (weight.is_shared() or mappings.hold(start))):
            found.add(name)
    return found


def lend_weights(model: nn.Module) -> None:
    """Record that another model shares the memory of this model from now on."""
    attach(model, shares_memory=True)


# ---------------------------------------------------------------------------------------------- private


def _span(tensor: Tensor) -> tuple[torch.device, int, int]:
    """Return the device, the first address, and the address behind the last byte."""
    elements = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride())) + 1
    start = tensor.data_ptr()
    return tensor.device, start, start + (elements * tensor.itemsize if tensor.numel() else 0)
