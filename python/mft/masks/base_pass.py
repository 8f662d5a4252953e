"""Compute the unmasked base with the masked model itself: every weight is kept, and no mask is read."""

import contextlib
from collections.abc import Callable, Iterator

import torch.nn.functional as F
from torch import Tensor, nn

from mft.masks.in_place.model import masks_in_place
from mft.masks.quantize import QuantizedLinear, QuantizedMaskedLinear
from mft.models.causal_lm import replace_forwards
from mft.models.routed_experts import unmasked_product
from mft_kernels import MaskedGroupedLinear, MaskedLayer, MaskedLinear


@contextlib.contextmanager
def use_whole_weights(*modules: nn.Module) -> Iterator[None]:
    """Make the masked layers in these modules compute with their whole weight, whatever their scores or masks are.

    For passes without gradients. The result equals convert.keep_all_weights up to the order of sums. The scores are not
    read, so the selected mask, which is cached until the scores change, stays cached. If a model's masks are in place
    (pass the model itself), its weights are whole in this context.
    """
    masked = [layer for module in modules for layer in module.modules() if isinstance(layer, MaskedLayer)]
    with contextlib.ExitStack() as lifted:
        for found in filter(None, map(masks_in_place, modules)):
            lifted.enter_context(found.use_whole_weights())
        with replace_forwards(masked, _whole):
            yield


def _whole(layer: nn.Module) -> Callable[..., Tensor]:
    if isinstance(layer, QuantizedMaskedLinear):
        return lambda x: QuantizedLinear(layer.quantized, layer.bias)(x)  # made per call: the bias may have moved
    if isinstance(layer, MaskedGroupedLinear):
        return lambda x, offsets: unmasked_product(x, layer.weight, offsets, layer.bias, layer.transposed)
    assert isinstance(layer, MaskedLinear)
    return lambda x: F.linear(x, layer.weight, layer.bias)
