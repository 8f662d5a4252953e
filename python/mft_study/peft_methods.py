"""Methods of PEFT: check their options, put their adapters on a model, and merge the adapters into the weights.

LoRA (arXiv 2106.09685) is one of them: y = x @ W.T + lora_alpha / r * (x @ A.T) @ B.T, where A (r, K) starts random and
B (N, r) starts at 0. If one parameter holds all experts, each expert has its own A and B, in two matrices of E * r.
What a method draws but does not train, such as VeRA's projections and SHiRA's positions, is drawn again from the seed.

`make peft-methods` tries every method that the installed PEFT has: docs/reference/peft-methods.md.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import types
import typing
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from mft.checks import check_rule, check_seed, install_command, nearest, type_hints

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

LORA, LN_TUNING = "LORA", "LN_TUNING"
# Methods that train modules other than linear layers. PEFT chooses these modules unless target_modules names them.
BESIDE_LINEARS = frozenset({LN_TUNING, "TRAINABLE_TOKENS"})
# Methods for which PEFT builds a model that is still not what the method's paper says, and why.
_INCOMPLETE = {
    "ADALORA": "it needs a training loop of its own, which reallocates its ranks between steps",
    "POLY": "it routes by the task of each row, and rows here have none",
    "SHADOW": "it trains a second model, not weights of the first",
    "XLORA": "it mixes adapters that were trained before",
}
# Keys that the study or the model decides. They are not options here.
_NOT_OPTIONS = frozenset({"fan_in_fan_out", "inference_mode", "layers_pattern", "target_parameters", "task_type"})
_NOT_OPTIONS |= {"auto_mapping", "base_model_name_or_path", "peft_type", "peft_version", "revision"}
# Every method chooses its layers as masks do: see masks/targets.py.
PLACES = {"layers_to_transform": int | list[int] | str | None, "target_modules": str | list[str] | None}
_ADAPTER = "default"  # PEFT's own name
# What PEFT raises if a method does not support the options or the model.
_THEIRS = (AssertionError, AttributeError, ImportError, LookupError, RuntimeError, TypeError, ValueError)


class MethodFailsError(RuntimeError):
    """A method of PEFT cannot be put on this model, run, loaded again or merged."""


def import_peft() -> Any:
    """Return the package peft. Raises: RuntimeError if it is not installed."""
    try:
        import peft
    except ImportError:
        raise RuntimeError(f"adapters need peft, which is not installed: {install_command('compare')}") from None
    return peft


# ---------------------------------------------------------------------------------------------- options


def check_options(options: Mapping[str, Any]) -> None:
    """Raise ValueError unless a method of PEFT has these options, each a value or a list of values to choose from."""
    kind, hints = options.get("peft_type"), _hints_of(options)
    for name, value in options.items():
        if name == "peft_type":
            continue
        if name not in hints:
            near = nearest(name, hints) or f"; it has {', '.join(hints)}"
            raise ValueError(f"config must hold options of {kind}, got {name!r}{near}")
        if not _fits(value, hints[name]) and not (
            isinstance(value, list) and value and all(_fits(one, hints[name]) for one in value)
        ):
            words = re.sub(r"typing\.|<class '([\w.]+)'>", r"\1", str(hints[name]))
            raise ValueError(f"config.{name} must be {words}, or a list of such values to choose from, got {value!r}")


def values_to_choose_from(options: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Return the values of each option: several if a list is given, unless the option itself takes such a list."""
    hints = _hints_of(options)
    return {
        name: [value] if name == "peft_type" or _fits(value, hints[name]) else value for name, value in options.items()
    }


def methods() -> dict[str, str]:
    """Return the reason why no study can run a method, by its peft_type; "" if a study can."""
    peft = import_peft()
    found = {}
    for kind, config in sorted((str(kind.value), one) for kind, one in peft.PEFT_TYPE_TO_CONFIG_MAPPING.items()):
        if not config.__module__.startswith(f"{peft.__name__}."):  # registered by others: masks have arms of their own
            continue
        if issubclass(config, peft.PromptLearningConfig) or kind == "ADAPTION_PROMPT":
            found[kind] = "it trains a prompt before the text, not weights of the model"
        else:
            found[kind] = _INCOMPLETE.get(kind, "")
    return found


def _hints_of(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the type of each option of the method. Raises: ValueError for a method that no study can run."""
    peft, known, kind = import_peft(), methods(), options.get("peft_type")
    if kind not in known:
        given = ", ".join(name for name, why in known.items() if not why)
        close = nearest(str(kind), known) or f"; it has {given}"
        raise ValueError(f"config.peft_type must be a method of PEFT {peft.__version__}, got {kind!r}{close}")
    if known[kind]:
        raise ValueError(f"config.peft_type must be a method that a study can run, got {kind}: {known[kind]}")
    config = peft.PEFT_TYPE_TO_CONFIG_MAPPING[kind]
    hints = type_hints(config)
    names = {item.name for item in dataclasses.fields(config)} - _NOT_OPTIONS
    return {name: hints[name] for name in sorted(names)} | PLACES


def _fits(value: Any, hint: Any) -> bool:
    """Return whether a YAML value fits an option of this type. A class of PEFT's own takes anything but a list."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, one) for one in arguments)
    if origin is typing.Literal:
        return value in arguments
    if origin in (list, set, tuple):
        return isinstance(value, list) and all(_fits(item, arguments[0]) for item in value)
    if origin is dict or hint is dict:
        return isinstance(value, dict)
    if hint in (int, float):
        return isinstance(value, int if hint is int else int | float) and not isinstance(value, bool)
    return isinstance(value, hint) if hint in (str, bool, types.NoneType, list) else not isinstance(value, list)


# ---------------------------------------------------------------------------------------------- adapters


def lora_options(rank: int) -> dict[str, Any]:
    """Return the options of LoRA that studies use."""
    check_rule(rank >= 1, "rank", "be at least 1", rank)
    return {"peft_type": LORA, "r": rank, "lora_alpha": 2 * rank, "lora_dropout": 0.0}


def add_adapter(model: nn.Module, names: Iterable[str], options: Mapping[str, Any], seed: int = 0) -> Any:
    """Put an fp32 adapter on exactly the named linear layers, in place; freeze everything but the adapter.

    The model keeps its own class. A method may write to the weights of these layers, so pass a model that owns them.
    Args:
        names: For a method of BESIDE_LINEARS, its target_modules, or empty for PEFT's own choice.
        options: peft_type and further options, without those of PLACES.
        seed: Seeds what the method draws. The state of torch's generator is restored afterwards.
    Returns: A PeftModel around the same model.
    Raises: ValueError for a name that is not a plain linear layer; MethodFailsError; RuntimeError without peft.
    """
    import torch

    check_seed(seed)
    peft, kind, names = import_peft(), str(options["peft_type"]), list(names)
    places = {"target_modules": names or None} if kind in BESIDE_LINEARS else _places_of(model, names, options)
    if kind == "SHIRA":  # its forward makes sparse tensors; torch warns unless its default (no checks) is set
        torch.sparse.check_sparse_tensor_invariants.disable()
    with torch.random.fork_rng(), _convert_errors(f"{kind} cannot be used here"):
        torch.manual_seed(seed)
        adapted = peft.get_peft_model(model, peft.get_peft_config(dict(options) | places), _ADAPTER)
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        if kind == LN_TUNING:
            for module in _adapters(adapted):
                module.register_forward_hook(_cast_back)
    return adapted


def merge_adapter(adapted: Any) -> tuple[nn.Module, list[str]]:
    """Merge an adapter from add_adapter into new parameters, in fp32 and rounded once.

    Returns: (the frozen model with its old names, the names of the parameters that the adapter was on).
    Raises: MethodFailsError if the method cannot be merged.
    """
    import torch
    from torch import nn

    changed: dict[str, torch.dtype] = {}
    with torch.no_grad(), _convert_errors(f"{adapted.peft_type.value} cannot be merged"):
        for module, path in _adapters(adapted).items():
            base = module.get_base_layer()
            for name, parameter in list(base.named_parameters()):
                changed[f"{path}.{name}"] = parameter.dtype
                inner, _, part = name.rpartition(".")
                own = nn.Parameter(parameter.to(torch.float32, copy=True), requires_grad=False)
                base.get_submodule(inner).register_parameter(part, own)
        merged = adapted.merge_and_unload().requires_grad_(False)
        names = [name for name, _ in merged.named_parameters() if name in changed]
        for name in names:
            parameter = merged.get_parameter(name)
            parameter.data = parameter.data.to(changed[name])
    return merged, names


def resident_bytes(adapted: Any, number: int) -> int:
    """Return the bytes of the adapter's tensors, without the layers' own weights. number: bytes per float."""
    tensors: dict[int, Tensor] = {}
    for module in _adapters(adapted):
        for name in (*module.adapter_layer_names, *module.other_param_names):
            tensors |= {each.data_ptr(): each for each in _tensors_of(getattr(module, name, None))}
    return sum(each.numel() * (number if each.is_floating_point() else each.itemsize) for each in tensors.values())


def _tensors_of(held: Any) -> Iterator[Tensor]:
    """Yield all tensors of a module, a dictionary or a tensor."""
    from torch import Tensor, nn

    if isinstance(held, Tensor):
        yield held
    elif isinstance(held, nn.Module):
        yield from (*held.parameters(), *held.buffers())
    elif isinstance(held, Mapping):
        for each in held.values():
            yield from _tensors_of(each)


def _places_of(model: nn.Module, names: list[str], options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that say which layers the adapter goes on."""
    from transformers.pytorch_utils import Conv1D

    from mft.models.linears import find_targets

    targets = find_targets(model, names)
    chosen = [target.name for target in targets]
    experts = [target.name for target in targets if target.is_parameter]
    check_rule(bool(chosen), "names", "hold at least one linear layer", chosen)
    kind = str(options["peft_type"])
    config = import_peft().PEFT_TYPE_TO_CONFIG_MAPPING[kind]
    known = {item.name for item in dataclasses.fields(config)}
    places: dict[str, Any] = {"target_modules": [name for name in chosen if name not in experts] or None}
    if experts:
        if "target_parameters" not in known:
            raise MethodFailsError(f"{kind} cannot go on experts in one parameter, such as {experts[0]}")
        places["target_parameters"] = experts
    if "fan_in_fan_out" in known:
        places["fan_in_fan_out"] = all(isinstance(target.module, Conv1D) for target in targets)
    if "feedforward_modules" in known and options.get("feedforward_modules") is not None:  # IA3: some of the targets
        endings = tuple(f".{name}" for name in options["feedforward_modules"])
        places["feedforward_modules"] = [name for name in chosen if f".{name}".endswith(endings)]
    return places


def _adapters(adapted: Any) -> dict[Any, str]:
    """Return the modules that hold adapters, each with the name of the module that it is on, in the model's order."""
    kind = import_peft().tuners.tuners_utils.BaseTunerLayer
    modules = adapted.get_base_model().named_modules()
    return {module: name.replace(".base_layer", "") for name, module in modules if isinstance(module, kind)}


def _cast_back(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """Return a norm's output in the dtype of its input, because its gains are fp32."""
    return output.to(args[0].dtype)


@contextlib.contextmanager
def _convert_errors(what: str) -> Iterator[None]:
    """Raise errors of PEFT as MethodFailsError, whose message begins with what; silence its warnings."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except _THEIRS as error:
        if isinstance(error, MethodFailsError):
            raise
        raise MethodFailsError(f"{what}: {type(error).__name__}: {error}") from error
