"""Yield the tensors of the merged model one at a time, for a process next to the training that needs updated weights.

For example, an inference engine that makes an RL trainer's completions: vLLM's load_weights takes (name, tensor) pairs.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mft.masks.convert import came_from_conv1d, mergeable_modules, original_of
from mft.masks.masked_experts import MaskedExperts
from mft.models.parallel import check_unsharded, unwrapped
from mft_kernels import MaskedLinear, MaskedMultiheadAttention


def merged_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) of what merge_model would give, under the unmasked model's names. The model is unchanged.

    Yields parameters and persistent buffers, module by module as in named_parameters, tied ones once. Kept weights are
    bit-equal to the base's, dropped ones are +0. A masked layer's weight is made on demand, so only one is in memory in
    addition to the model. All other tensors are the model's own; only read them.

    Args:
        model: of mask_model or load_masks, or a PeftModel whose active adapter is a mask; modules_to_save are then that
            adapter's copies. May be wrapped in torch.compile or DistributedDataParallel.
    Raises: ValueError, before the first tensor, if nothing is masked, scores are not finite, weights are quantised, or
        fully_shard has sharded the model.
    """
    model = unwrapped(model)
    check_unsharded(model)
    if hasattr(model, "peft_config"):
        model = _peft_base(model)
    else:
        mergeable_modules(model)
    return _tensors(model, "", set())


def is_peft_mask(module: Any) -> bool:
    """Return whether module is a PEFT mask layer, without importing PEFT, which may be absent."""
    return getattr(type(module), "masks_weight", False) and hasattr(module, "mft_scores")


# ---------------------------------------------------------------------------------------------- private


def _peft_base(model: Any) -> nn.Module:
    """Return the model inside a PeftModel. Raises ValueError as merged_weights does."""
    layers = [module for module in model.modules() if is_peft_mask(module)]
    if not layers:
        kinds = ", ".join(sorted({str(getattr(c.peft_type, "value", c.peft_type)) for c in model.peft_config.values()}))
        raise ValueError(f"model must have masks to merge, got a {type(model).__name__} of {kinds}: use merge_adapter")
    for layer in layers:
        for parameter in layer.names:
            layer.merged_weight(parameter)  # raises here rather than halfway through
    return model.get_base_model()


def _tensors(module: Any, prefix: str, seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of module and its children. seen: ids of the modules and tensors already yielded."""
    if id(module) in seen:
        return
    seen.add(id(module))
    if isinstance(module, MaskedLinear):
        yield f"{prefix}weight", _merged(module)
        yield from _new({"bias": module.bias}, prefix, seen)
        if original_of(module) is not None:  # the replaced module without weight and bias
            yield from _tensors(original_of(module), prefix, seen)
    elif isinstance(module, MaskedMultiheadAttention):
        yield from _packed(module, prefix, seen)
    elif isinstance(module, MaskedExperts):
        yield from _tensors_of_experts(module, prefix, seen)
    elif is_peft_mask(module):
        base = module.base_layer
        for name, tensor in (base._parameters | _saved_buffers(base)).items():
            if name in module.names:
                yield f"{prefix}{name}", module.merged_weight(name)
            else:
                yield from _new({name: tensor}, prefix, seen)
        yield from _children(base, prefix, seen)
    elif hasattr(module, "modules_to_save"):  # PEFT's wrapper of a module that is trained whole
        trained = next((name for name in module.active_adapters if name in module.modules_to_save), None)
        base = module.disable_adapters or trained is None
        yield from _tensors(module.original_module if base else module.modules_to_save[trained], prefix, seen)
    else:
        yield from _new(module._parameters | _saved_buffers(module), prefix, seen)
        yield from _children(module, prefix, seen)


def _children(module: Any, prefix: str, seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    for name, child in module._modules.items():
        if child is not None:
            yield from _tensors(child, f"{prefix}{name}.", seen)


def _saved_buffers(module: Any) -> dict[str, Tensor | None]:
    return {name: b for name, b in module._buffers.items() if name not in module._non_persistent_buffers_set}


def _tensors_of_experts(experts: Any, prefix: str, seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    """Yield the experts' tensors under the names and in the order of the unmasked module."""
    masked: dict[str, Any] = experts._modules
    biases = {projection.bias: name for name, projection in experts._projections.items()}
    for part in experts._order:
        if part in experts._projections:
            yield f"{prefix}{part}", masked[part].merged_weight()
        else:
            owner = masked[biases[part]] if part in biases else experts
            yield from _new({part: owner.bias if part in biases else getattr(experts, part)}, prefix, seen)
    for name, child in masked.items():
        if name not in experts._projections and child is not None:
            yield from _tensors(child, f"{prefix}{name}.", seen)


def _packed(module: MaskedMultiheadAttention, prefix: str, seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    """Yield the attention's tensors under the names and in the order of nn.MultiheadAttention."""
    bias: Tensor | None = module.in_proj_bias
    for name, child in module.named_children():
        if isinstance(child, nn.Linear) and name != "out_proj":
            yield from _new({f"{name}_weight": child.weight}, prefix, seen)
        elif name != "out_proj":
            yield next(_tensors(child, f"{prefix}{name}_", set()))
    if bias is not None and not hasattr(module, "in_proj"):  # joined from three biases, so its id is always new
        yield f"{prefix}in_proj_bias", bias.detach()
        bias = None
    yield from _new({"in_proj_bias": bias, **module._parameters}, prefix, seen)
    yield from _tensors(module.out_proj, f"{prefix}out_proj.", seen)


def _new(tensors: dict[str, Tensor | None], prefix: str, seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tensors.items():
        if tensor is not None and id(tensor) not in seen:
            seen.add(id(tensor))
            yield f"{prefix}{name}", tensor.detach()


@torch.no_grad()
def _merged(module: MaskedLinear) -> Tensor:
    weight = module.merged_weight()
    return weight.t().contiguous() if came_from_conv1d(module) else weight
