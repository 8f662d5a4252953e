"""The base that a mask lies on, computed with the model itself: every weight kept, and no bit of a mask read."""

import contextlib
from collections.abc import Callable, Iterator

import torch.nn.functional as F
from torch import Tensor, nn

from mft.masks.in_place.model import masks_in_place
from mft.masks.quantize import QuantizedLinear, QuantizedMaskedLinear
from mft.models.causal_lm import replaced_forwards
from mft.models.experts import unmasked_product
from mft_kernels import MaskedGroupedLinear, MaskedLayer, MaskedLinear


@contextlib.contextmanager
def as_base(*modules: nn.Module) -> Iterator[None]:
    """Masked layers in these modules compute with their whole weight meanwhile, whatever they hold or have learned.

    For passes without gradients. As convert.keeping_all up to the order of sums, but the scores are not looked at, so
    that the selection of the mask, which is remembered between changes of the scores, stays remembered. Of a model
    whose masks are in place (modules: the model itself), the weights are whole meanwhile.
    """
    masked = [layer for module in modules for layer in module.modules() if isinstance(layer, MaskedLayer)]
    with contextlib.ExitStack() as lifted:
        for found in filter(None, map(masks_in_place, modules)):
            lifted.enter_context(found.lifted())
        with replaced_forwards(masked, _whole):
            yield


def _whole(layer: nn.Module) -> Callable[..., Tensor]:
    if isinstance(layer, QuantizedMaskedLinear):
        return lambda x: QuantizedLinear(layer.quantized, layer.bias)(x)  # anew: the bias may lie elsewhere by then
    if isinstance(layer, MaskedGroupedLinear):
        return lambda x, offsets: unmasked_product(x, layer.weight, offsets, layer.bias, layer.transposed)
    assert isinstance(layer, MaskedLinear)
    return lambda x: F.linear(x, layer.weight, layer.bias)
