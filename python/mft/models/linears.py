"""Find the linear layers of a model, and layers in their place. Tell which can be masked, and why the others cannot.

Every module that is a linear layer, or looks like one, is a candidate. So are experts stored as one parameter, even if
it is unknown how their module computes: then choosing them is an error instead of being ignored silently.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from mft.checks import nearest
from mft.models.codes.quantized_linears import holds_codes, why_no_codes
from mft.models.codes.weight import QuantizedWeight
from mft.models.routed_experts import expert_projections
from mft.models.weight_readers import why_read
from mft_kernels import MaskedLayer
from mft_kernels.internal import (
    has_slow_path,
    projections,
    why_lost,
    why_no_mask,
    why_no_scores,
    why_not_split,
    why_not_there,
)

_HEADS = {"lm_head", "embed_out"}
_SHOWN = 3  # names that a message lists
_DEPTH = re.compile(r"(layers?|depths?|blocks|stages|sizes)$")  # num_hidden_layers, n_layer, Swin's depths


@dataclass(frozen=True)
class Candidate:
    """A linear layer, or a module or parameter in the place of one, by its name in the model."""

    name: str
    weight_name: str  # of its weight, as a parameter of the model
    module: nn.Module
    layer: int | None  # index of the decoder layer that contains it
    obstacle: str | None = None  # why it cannot be masked
    is_parameter: bool = False  # a parameter of module, such as all experts in one, not a module of its own
    is_head: bool = False
    holds_codes: bool = False  # codes are its only obstacle: see codes/quantized_linears.py

    @property
    def suffix(self) -> str:
        """The name that a list of patterns would use."""
        parts = self.name.split(".")
        return ".".join(parts[-2:]) if self.is_parameter and parts[-1] == "weight" else parts[-1]

    @property
    def weight(self) -> Tensor:
        """Its weight: (N, K); (K, N) for a Conv1D; (E, N, K) is possible for experts."""
        return getattr(self.module, self.name.rpartition(".")[2] if self.is_parameter else "weight")


def find_candidates(model: nn.Module, stacks: dict[str, nn.ModuleList]) -> list[Candidate]:
    """Return all candidates in the model's order."""
    getters = [getattr(m, "get_output_embeddings", None) for m in (model, *model.children())]
    heads = {id(getter()) for getter in getters if getter is not None}
    found: list[Candidate] = []
    wrappers: dict[str, nn.Module] = {}  # layers of other adapters; they own the layers inside them
    for name, module in model.named_modules():
        layer = layer_index(name, stacks)
        if _looks_linear(module):
            is_head = id(module) in heads or name.rpartition(".")[2] in _HEADS
            owner = next((type(m).__name__ for outer, m in wrappers.items() if name.startswith(f"{outer}.")), None)
            obstacle = f"it belongs to the {owner} around it" if owner else _obstacle(model, name, module)
            is_coded = not owner and holds_codes(module)
            if is_coded:
                why = _obstacle(model, name, module, codes=True)
                is_coded, obstacle = why is None, why or obstacle
            own = weight_name(model, name)
            found.append(Candidate(name, own, module, layer, obstacle, is_head=is_head, holds_codes=is_coded))
            if next(module.children(), None) is not None:
                wrappers[name] = module
        if isinstance(module, nn.MultiheadAttention) and "in_proj_weight" in module._parameters:
            for part, linear in projections(module).items():
                packed = f"{name}.{part}".removeprefix(".")
                if part != "out_proj":  # out_proj is a module, and so is found by itself
                    obstacle = _obstacle(model, packed, linear)
                    found.append(Candidate(packed, f"{packed}_weight", linear, layer, obstacle))
        for part, parameter in _expert_parameters(name, module):
            obstacle = _obstacle_of_experts(module, part, parameter)
            whole = f"{name}.{part}"
            found.append(Candidate(whole, whole, module, layer, obstacle, is_parameter=True))
    return found


def find_targets(model: nn.Module, names: Iterable[str]) -> list[Candidate]:
    """Return the linear layers of exactly these names. Raises ValueError for an unknown or unmaskable one."""
    candidates = {c.name: c for c in find_candidates(model, layer_stacks(model))}
    found = []
    for name in names:
        if name not in candidates:
            raise ValueError(f"model has no linear layer named {name!r}{nearest(name, candidates)}")
        if candidates[name].is_head:
            raise ValueError(f"{name} is the output embedding, which is never masked")
        found.append(candidates[name])
    check_maskable(model, found)
    return found


def check_maskable(model: nn.Module, chosen: Iterable[Candidate], *, codes: bool = False) -> None:
    """Raise ValueError that names chosen layers that cannot be masked (codes: can those with codes?) or are shared."""
    chosen = list(chosen)
    blocked = [c for c in chosen if c.obstacle and not (codes and c.holds_codes)]
    if blocked:
        also = f" ({len(blocked) - 1} more cannot be masked either)" if len(blocked) > 1 else ""
        suffixes = sorted({c.suffix for c in blocked})
        raise ValueError(
            f"cannot mask {blocked[0].name}: {blocked[0].obstacle}{also}. Choose other target_modules, or leave such "
            f"modules as they are with exclude_modules={suffixes}"
        )
    sharers = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        sharers[_memory(parameter)].append(name)
    for candidate in chosen:
        if candidate.holds_codes:
            continue
        others = [n for n in sharers[_memory(candidate.weight)] if n != candidate.weight_name]
        if others:
            raise ValueError(
                f"cannot mask {candidate.name}: its weight is tied to {list_some(others)}, and a mask on one of them "
                "would be lost, or spread to the others, when the model is saved. Untie it first "
                "(module.weight = nn.Parameter(module.weight.clone())), or leave it out with exclude_modules"
            )


def weight_name(model: nn.Module, name: str) -> str:
    """Return the name of a layer's weight parameter; experts in one parameter are named by the parameter itself."""
    path, _, part = name.rpartition(".")
    parent = model.get_submodule(path)
    if part in parent._parameters:
        return name
    packed = isinstance(parent, nn.MultiheadAttention) and f"{part}_weight" in parent._parameters
    return f"{name}_weight" if packed else f"{name}.weight"


def linear_named(model: nn.Module, name: str) -> Any:
    """Return the layer of a candidate's name. An nn.MultiheadAttention's projection becomes a linear on its weight."""
    path, _, child = name.rpartition(".")
    parent = model.get_submodule(path)
    if isinstance(parent, nn.MultiheadAttention):
        return projections(parent)[child]
    return model.get_submodule(name)


def layer_stacks(model: nn.Module) -> dict[str, nn.ModuleList]:
    """Return the lists of layers by name: the outermost ModuleLists, or only those as long as the config says, if any.

    If the model generates text from one decoder, only that decoder's lists count, not its vision tower's.
    """
    stacks = outer_lists(model)
    config: Any = getattr(model, "config", None)
    generates = isinstance(model, PreTrainedModel) and model.can_generate()
    if generates and not getattr(config, "is_encoder_decoder", False):
        inside = set(map(id, cast(Any, model).get_decoder().modules()))
        stacks = {name: stack for name, stack in stacks.items() if id(stack) in inside} or stacks
        configs = [config.get_text_config(decoder=True)]
    else:
        configs = list(_config_parts(config))
    depths = set().union(*map(_depths, configs))
    return {name: stack for name, stack in stacks.items() if len(stack) in depths} or stacks


def outer_lists(model: nn.Module) -> dict[str, nn.ModuleList]:
    """Return the ModuleLists that hold linear layers and are not inside another one."""
    lists: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in lists)
        if isinstance(module, nn.ModuleList) and not inside and any(map(_looks_linear, module.modules())):
            lists[name] = module
    return lists


def layer_index(name: str, stacks: dict[str, nn.ModuleList]) -> int | None:
    """Return the index of the decoder layer in a module's path: 3 for "model.layers.3.mlp.up_proj"."""
    for stack in stacks:
        prefix = f"{stack}." if stack else ""
        index = name.removeprefix(prefix).partition(".")[0]
        if name.startswith(prefix) and index.isdecimal():
            return int(index)
    return None


def list_some(items: Iterable[str]) -> str:
    """Join the first few items for a message, and say how many more there are."""
    items = list(items)
    rest = len(items) - _SHOWN
    return ", ".join(items[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")


# ---------------------------------------------------------------------------------------------- private


def _depths(config: Any) -> set[int]:
    """Return every number of layers, and of a pyramid's stages, in a configuration."""
    found = [value for key, value in getattr(config, "__dict__", {}).items() if _DEPTH.search(key)]
    lengths = {len(value) for value in found if isinstance(value, list | tuple)}
    return lengths | {value for value in found if type(value) is int}


def _config_parts(config: Any) -> Iterator[Any]:
    """Yield the configuration and its sub-configurations."""
    yield config
    for name in getattr(config, "sub_configs", ()):
        if getattr(config, name, None) is not None:
            yield from _config_parts(getattr(config, name))


def _looks_linear(module: nn.Module) -> bool:
    if isinstance(module, nn.Linear | Conv1D):
        return True
    if "Linear" not in type(module).__name__:
        return False
    if isinstance(getattr(module, "quantized", None), QuantizedWeight):  # first: reading its weight would decode it
        return True
    weight = getattr(module, "weight", None)
    is_matrix = isinstance(weight, Tensor) and weight.dim() == 2
    is_wrapper = hasattr(module, "base_layer") or hasattr(module, "qweight")  # LoRA and its kin; GPTQ and its kin
    return is_matrix or is_wrapper


def _obstacle(model: nn.Module, name: str, module: nn.Module, *, codes: bool = False) -> str | None:
    """Return why a layer cannot be masked; None if it can. codes: for a layer of codes, where codes are allowed."""
    path, _, child = name.rpartition(".")
    parent = model.get_submodule(path)
    if codes:
        why = why_not_there(parent, child) or why_no_codes(module) or why_lost(module)
    elif isinstance(parent, nn.MultiheadAttention):
        return _attention_obstacle(model, path, parent, child) or why_no_mask(module)
    else:
        kind = Conv1D if isinstance(module, Conv1D) else nn.Linear
        why = why_not_there(parent, child) or why_no_mask(module, kind)
    return why if why or has_slow_path(parent, child) else why_read(parent, child)


def _obstacle_of_experts(module: nn.Module, part: str, parameter: nn.Parameter) -> str | None:
    if part not in expert_projections(module):
        return (
            f"it is one parameter {tuple(parameter.shape)} of {type(module).__name__}, and how it computes is "
            "unknown: transformers' interface for experts does not run it"
        )
    if getattr(module, "_is_expert_parallel", False):
        return "its experts are spread over processes: masks need all of them in each"
    if hasattr(module, "_hf_hook") or "forward" in vars(module):
        return (
            "the forward of its module is replaced (by a device_map of several devices or offloading, or patched): "
            "load it on one device, mask it, and dispatch it afterwards"
        )
    return why_no_scores(parameter)


def _attention_obstacle(model: nn.Module, path: str, attention: nn.MultiheadAttention, child: str) -> str | None:
    """Return why the attention at ``path`` cannot be replaced by one that calls its projections; None if it can."""
    if not path:
        return "it lies in the model itself, which cannot be replaced: MaskedMultiheadAttention.from_attention(model)"
    around, _, name = path.rpartition(".")
    parent = model.get_submodule(around)
    if name == "base_layer":
        return f"it belongs to the {type(parent).__name__} around it"
    why = why_not_split(attention)
    return why if why or has_slow_path(parent, name) else why_read(parent, f"{name}.{child}")


def _expert_parameters(name: str, module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Return the parameters of one module that hold matrices of a mixture's experts: (E, N, K), or flattened."""
    if isinstance(module, nn.Linear | Conv1D | nn.Embedding | nn.modules.conv._ConvNd | MaskedLayer):
        return []
    is_experts = "expert" in type(module).__name__.lower() or "experts" in name.split(".")

    def holds_matrices(part: str, parameter: nn.Parameter) -> bool:
        stacked = (parameter.dim() == 3 or (parameter.dim() > 3 and is_experts)) and min(parameter.shape) > 1
        return stacked or (parameter.dim() == 2 and is_experts and "bias" not in part)

    return [(part, p) for part, p in module.named_parameters(recurse=False) if holds_matrices(part, p)]


def _memory(parameter: Tensor) -> tuple:
    """Return a key that is equal for two parameters if they are the same object, or share their memory."""
    address = 0 if parameter.is_meta else parameter.data_ptr()
    return ("address", address, parameter.numel(), parameter.device) if address else ("object", id(parameter))
