"""MaskedExperts: a mixture's experts of transformers, with masks on the projections that lie in one parameter each.

A module keeps its place, its state and its methods: its class becomes one of MaskedExperts and the class that it was.
A masked projection is a MaskedGroupedLinear under the parameter's name: "experts.gate_up_proj.scores".
"""

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from mft.models.experts import ExpertProjection, RoutedRows, expert_projections, flags, unmasked_product

Layer = TypeVar("Layer", bound=nn.Module)


class MaskedExperts(nn.Module):
    """What a class of experts becomes by mask_experts: the same function of its inputs, masks applied.

    A class that transformers runs by its experts interface computes as that interface's "grouped_mm" does, whatever
    config._experts_implementation says: rows sorted by expert, one product over all experts a projection. Sums and
    gradients are in one order, so that they repeat bit for bit.
    """

    _kind: type[nn.Module]  # the class that the module had
    _projections: dict[str, ExpertProjection]  # of its parameters, those that are masked
    _order: list[str]  # of the parameters it had
    _watch: Callable[[str, Tensor, Tensor], None] | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return _FORWARDS.get(self._kind.__name__, _routed)(self, *args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _restored, (self._kind,), self.__dict__  # the class is made at run time, which a pickle cannot name


def mask_experts(experts: Any, name: str, mask: Callable[..., Layer]) -> Layer:
    """Replace the parameter ``name`` of experts by mask(weight, bias, transposed=...), in place.

    That is a MaskedGroupedLinear, or another module that is called with rows and offsets; see quantize.py.
    """
    projection = expert_projections(experts)[name]
    parameters = experts._parameters
    bias = None if projection.bias is None else parameters[projection.bias]
    layer = mask(parameters[name], bias, transposed=projection.transposed)
    if not isinstance(experts, MaskedExperts):
        experts.__class__ = _masked_class(type(experts))
        experts._projections, experts._order = {}, list(parameters)
    experts._projections[name] = projection
    for part in (name, projection.bias):
        if part is not None:
            delattr(experts, part)
    setattr(experts, name, layer.train(experts.training))
    return layer


def unmask_experts(experts: Any, name: str, weight: Tensor, bias: Tensor | None) -> None:
    """Put weight (and bias) back as the parameter that ``name`` was; without masks experts are what they were."""
    projection = experts._projections.pop(name)
    delattr(experts, name)
    experts.register_parameter(name, _parameter(weight))
    if projection.bias is not None:
        assert bias is not None, "the layer took it over"
        experts.register_parameter(projection.bias, _parameter(bias))
    if not experts._projections:
        experts._parameters = {part: experts._parameters[part] for part in experts._order}
        del experts._projections, experts._order
        experts.__class__ = experts._kind


def unmasked_experts(experts: Any) -> nn.Module:
    """The module that experts were, beside them and on the same memory; what is quantised stays as it is."""
    plain = copy.copy(experts)
    plain.__dict__ = experts.__dict__ | {
        "_parameters": dict(experts._parameters),
        "_modules": dict(experts._modules),
        "_projections": dict(experts._projections),
    }
    for name in list(plain._projections):
        layer = plain._modules[name]
        if "weight" in layer._parameters:
            unmask_experts(plain, name, layer.weight, layer.bias)
    return plain


@contextlib.contextmanager
def watching_experts(model: nn.Module, watch: Callable[[str, Tensor, Tensor], None]) -> Iterator[None]:
    """watch(name, rows, offsets) of whatever reaches a projection meanwhile, masked or not: rows (T, K) by expert."""
    watched: list[tuple[Any, bool]] = []
    for path, module in model.named_modules():
        if not expert_projections(module) and not isinstance(module, MaskedExperts):
            continue
        experts: Any = module
        watched.append((experts, isinstance(experts, MaskedExperts)))
        if not isinstance(experts, MaskedExperts):
            experts.__class__ = _masked_class(type(experts))
        prefix = f"{path}." if path else ""
        experts._watch = lambda part, rows, offsets, prefix=prefix: watch(f"{prefix}{part}", rows, offsets)
    try:
        yield
    finally:
        for experts, was_masked in watched:
            del experts._watch
            if not was_masked:
                experts.__class__ = experts._kind


# ---------------------------------------------------------------------------------------------- private


def _parameter(tensor: Tensor) -> nn.Parameter:
    return tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor)


_CLASSES: dict[type[nn.Module], type[MaskedExperts]] = {}  # that were made, by the class that modules had


def _masked_class(kind: type[nn.Module]) -> type[MaskedExperts]:
    if kind not in _CLASSES:
        parts = {"_kind": kind, "__module__": __name__}
        _CLASSES[kind] = type(f"Masked{kind.__name__}", (MaskedExperts, kind), parts)
    return _CLASSES[kind]


def _restored(kind: type[nn.Module]) -> MaskedExperts:
    cls = _masked_class(kind)
    return cls.__new__(cls)


def _project(self: Any, name: str, rows: Tensor, offsets: Tensor) -> Tensor:
    """A projection of rows that are sorted by expert, masked or not."""
    if self._watch is not None:
        self._watch(name, rows, offsets)
    layer = getattr(self, name)
    if isinstance(layer, nn.Module):
        return layer(rows, offsets)
    projection = expert_projections(self)[name]
    bias = None if projection.bias is None else getattr(self, projection.bias)
    return unmasked_product(rows, layer, offsets, bias, projection.transposed)


def _routed(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """As transformers.integrations.moe.grouped_mm_experts_forward: hidden_states (T, H), the others (T, k)."""
    found = flags(self)
    assert found is not None, f"{self._kind.__name__} has no forward of its own in _FORWARDS"
    rows = RoutedRows(top_k_index, self.num_experts)
    x = rows.of_experts(hidden_states)
    if found["has_gate"]:
        x = self._apply_gate(_project(self, "gate_up_proj", x, rows.offsets))
    else:
        x = self.act_fn(_project(self, "up_proj", x, rows.offsets))
    x = _project(self, "down_proj", x, rows.offsets)
    if found["has_post_expert_norm"]:
        x = self.post_expert_norm(x)
    return rows.of_tokens(x, top_k_weights).to(hidden_states.dtype)


def _llama4(self: Any, hidden_states: Tensor) -> Tensor:
    """As Llama4TextExperts.forward: each expert has every token, (E * T, H)."""
    experts = self.num_experts
    ends = torch.arange(1, experts + 1, device=hidden_states.device, dtype=torch.int32)
    offsets = ends * (len(hidden_states) // experts)
    gate, up = _project(self, "gate_up_proj", hidden_states, offsets).chunk(2, dim=-1)
    return _project(self, "down_proj", up * self.act_fn(gate), offsets)


def _jetmoe(self: Any, inputs: Tensor, expert_size: Any) -> Tensor:
    """As JetMoeParallelExperts.forward: expert_size says how many rows each expert has."""
    offsets = torch.as_tensor(expert_size, device=inputs.device).cumsum(0).int()
    return _project(self, "weight", inputs, offsets)


_FORWARDS: dict[str, Callable[..., Tensor]] = {"Llama4TextExperts": _llama4, "JetMoeParallelExperts": _jetmoe}
