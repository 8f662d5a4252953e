"""LoRA on chosen linear layers, by peft: what as many trained numbers gain where masks would go (arXiv 2106.09685).

y = x @ W.T + alpha / rank * (x @ A.T) @ B.T with alpha = 2 * rank; A (rank, K) random, B (N, rank) 0 at first.
Experts in one parameter have an A and a B each, in two matrices of E * rank.
"""

import copy
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from mft.checks import check_rule, check_seed
from mft.models.linears import find_targets

_ADAPTER = "default"  # peft's own name


def import_peft() -> Any:
    """The package peft. Raises: RuntimeError if it is not installed."""
    try:
        import peft
    except ImportError:
        raise RuntimeError("LoRA needs peft, which is not installed: pip install 'mft_kernels[compare]'") from None
    return peft


def add_lora(model: nn.Module, names: Iterable[str], rank: int = 8, seed: int = 0) -> nn.Module:
    """Put an adapter of ``rank`` on exactly the named linear layers, in place; freeze everything but the adapters.

    The model stays of its own class (no PeftModel around it), so train_loop and evaluate take it. Weights are shared,
    not copied, and never change. Adapters are fp32 beside fp16 and bf16 weights; a function of seed and names.

    Returns: the same model. Raises: ValueError if a name is no plain linear layer, or rank is below 1; RuntimeError
        without peft.
    """
    check_rule(rank >= 1, "rank", "be at least 1", rank)
    check_seed(seed)
    targets = find_targets(model, names)
    chosen = [target.name for target in targets]
    experts = [target.name for target in targets if target.is_parameter]
    check_rule(bool(chosen), "names", "hold at least one linear layer", chosen)
    peft = import_peft()
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        lora_dropout=0.0,
        target_modules=[name for name in chosen if name not in experts] or None,
        target_parameters=experts or None,
        fan_in_fan_out=all(isinstance(target.module, Conv1D) for target in targets),
    )
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "target_parameters", UserWarning)  # that LoRA on experts is new
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(config, model, _ADAPTER)  # freezes all else
    adapters = _adapters(model)
    assert set(adapters) == set(chosen), (list(adapters), chosen)  # peft takes names for suffixes too
    for module in adapters.values():
        module.lora_A.float()
        module.lora_B.float()
    return model


@torch.no_grad()
def merge_lora(model: nn.Module) -> nn.Module:
    """Add the adapters into the weights, in place: an ordinary model with the names that it had.

    W + 2 * B @ A is summed in fp32, rounded once, and a parameter of its own: a model that shares W keeps it.

    Returns: the same model, still frozen. Raises: ValueError if it holds no adapters.
    """
    adapters = _adapters(model)
    experts: dict[str, dict[str, Tensor]] = {}  # merged weights by the experts' module
    if not adapters:
        raise ValueError("model must hold LoRA adapters, found none: call add_lora(model, names, rank, seed) first")
    for name, module in adapters.items():
        base, (path, _, part) = module.get_base_layer(), name.rpartition(".")
        part = getattr(module, "parameter_name", "weight")
        old = getattr(base, part)
        weight = nn.Parameter((old + module.get_delta_weight(_ADAPTER)).to(old.dtype), requires_grad=False)
        if part != "weight":
            experts.setdefault(path, {})[part] = weight
            continue
        merged = copy.deepcopy(base, {id(old): weight, id(base.bias): base.bias})
        setattr(model.get_submodule(path), name.rpartition(".")[2], merged)
    for path, weights in experts.items():
        wrapper: Any = model.get_submodule(path)
        base = wrapper.get_base_layer()
        shared = {id(p): weights.get(part, p) for part, p in base.named_parameters()}
        parent, _, child = path.rpartition(".")
        setattr(model.get_submodule(parent), child, copy.deepcopy(base, shared))
    vars(model).pop("peft_config", None)  # inject_adapter_in_model left it on the model
    return model


def _adapters(model: nn.Module) -> dict[str, Any]:
    """The adapters by the names of the layers they are on, in the model's order."""
    layer = import_peft().tuners.lora.LoraLayer
    found = {name: module for name, module in model.named_modules() if isinstance(module, layer)}
    return {_adapted(name, module): module for name, module in found.items()}


def _adapted(name: str, adapter: Any) -> str:
    """The layer's own name: those on parameters of one module lie around it, one within the other."""
    parameter = getattr(adapter, "parameter_name", None)
    return name if parameter is None else f"{name.replace('.base_layer', '')}.{parameter}"
