"""The base of a masked model as a second model on the same memory, such as a preference trainer's reference model."""

import copy
from typing import Any

from torch import nn

from mft.masks.convert import masked_modules
from mft.masks.gradient_checkpointing import remove_checkpointing_hooks
from mft.masks.in_place.others_memory import lend_weights
from mft.masks.masked_experts import MaskedExperts, share_experts, unmask_experts
from mft.masks.quantize import QuantizedLinear, QuantizedMaskedGroupedLinear, QuantizedMaskedLinear
from mft.models.codes.quantized_experts import QuantizedGroupedLinear
from mft.models.parallel import check_unsharded, unwrapped
from mft_kernels import MaskedLinear
from mft_kernels.internal import linear_on


def unmasked_model(model: nn.Module) -> nn.Module:
    """Return the model that was given to mask_model, in eval mode, next to the masked one. No weight is copied.

    Use it to compare a mask with its base while it learns, for example as ref_model of TRL's DPOTrainer. Do not write
    to it: both models compute with the same tensors. A Conv1D, or a linear of another class, becomes an nn.Linear. On a
    quantised base the result is quantised too.

    Args: model: masked; may be wrapped in torch.compile or DistributedDataParallel.
    Raises: ValueError if nothing is masked, if anything but scores is trained (because then the base changes), or if
        the model is spread over devices or processes.
    """
    model = unwrapped(model)
    check_unsharded(model)
    masked = masked_modules(model)
    if not masked:
        raise ValueError(
            f"model must have masked layers, got a {type(model).__name__} without: mask_model it first "
            "(a PeftModel has disable_adapter())"
        )
    scores = {id(module.scores) for module in masked.values()}
    trained = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in scores]
    if trained:
        raise ValueError(
            f"model must train scores alone, or its base changes too, got {len(trained)} other parameters "
            f"({trained[0]}, ...): load the base a second time"
        )
    spread = next((name for name, module in model.named_modules() if hasattr(module, "_hf_hook")), None)
    if spread is not None:
        raise ValueError(
            f"model must lie on one device, got hooks of accelerate's at {spread or 'the model'}: take the unmasked "
            "model before dispatch_model"
        )
    shared: dict[int, Any] = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    shared |= {id(m): _unmasked_experts(m) for m in model.modules() if isinstance(m, MaskedExperts)}
    for module in masked.values():
        if isinstance(module, QuantizedMaskedLinear):
            shared[id(module)] = QuantizedLinear(module.quantized, module.bias)
        elif isinstance(module, MaskedLinear):
            shared[id(module)] = linear_on(module.weight, module.bias)
    made: Any = copy.deepcopy(model, shared)
    vars(made).pop("forward", None)  # a trainer may have set one that is bound to the masked model
    remove_checkpointing_hooks(made)
    lend_weights(model)
    return made.eval()


def _unmasked_experts(experts: MaskedExperts) -> nn.Module:
    """Return an unmasked copy of experts that shares its tensors. Quantised projections stay quantised."""
    plain: Any = share_experts(experts)
    for name in list(plain._projections):
        layer = plain._modules[name]
        if "weight" in layer._parameters:
            unmask_experts(plain, name, layer.weight, layer.bias)
        elif isinstance(layer, QuantizedMaskedGroupedLinear):
            plain._modules[name] = QuantizedGroupedLinear(
                layer.quantized, layer.experts, layer.bias, transposed=layer.transposed
            )
    return plain
