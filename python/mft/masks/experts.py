"""MaskedExperts: a mixture's experts of transformers, with masks on the projections that lie in one parameter each.

A module keeps its place, its state and its methods: its class becomes one of MaskedExperts and the class that it was.
A masked projection is a MaskedGroupedLinear under the parameter's name: "experts.gate_up_proj.scores".
"""

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mft.models.experts import ExpertProjection, RoutedRows, expert_projections, flags, unmasked_product


class MaskedExperts(nn.Module):
    """What a class of experts becomes by mask_experts: the same function of its inputs, masks applied.

    A class that transformers runs by its experts interface computes as that interface's "grouped_mm" does, whatever
    config._experts_implementation says: rows sorted by expert, one product over all experts a projection. Sums and
    gradients are in one order, so that they repeat bit for bit.
    """

    _kind: type[nn.Module]  # the class that the module had
    _masked: type["MaskedExperts"]  # this class, or the subclass of it that the module's is of
    _projections: dict[str, ExpertProjection]  # of its parameters, those that are masked
    _order: list[str]  # of the parameters it had
    _watch: Callable[[str, Tensor, Tensor], None] | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return experts_forward(self, self._project, *args, **kwargs)

    def _project(self, name: str, rows: Tensor, offsets: Tensor) -> Tensor:
        if self._watch is not None:
            self._watch(name, rows, offsets)
        return project(self, name, rows, offsets)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made at run time, which a pickle cannot name.
        return _restored, (self._masked, self._kind), self.__dict__


def mask_experts(
    experts: Any, name: str, mask: Callable[..., nn.Module], masked: type[MaskedExperts] = MaskedExperts
) -> Any:
    """Replace the parameter ``name`` of experts, which become ``masked``, by mask(weight, bias, transposed=...).

    In place. The layer, a MaskedGroupedLinear or another (see quantize.py), is called with rows that are sorted by
    expert, and their offsets. Returns it.
    """
    projection = expert_projections(experts)[name]
    parameters = experts._parameters
    bias = None if projection.bias is None else parameters[projection.bias]
    layer = mask(parameters[name], bias, transposed=projection.transposed)
    if not isinstance(experts, MaskedExperts):
        experts.__class__ = _masked_class(masked, type(experts))
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


def beside(experts: Any) -> nn.Module:
    """A module like experts, masked or not, on the same memory; a mask on one of them leaves the other as it is."""
    made = copy.copy(experts)
    own = ("_parameters", "_modules", "_projections")
    made.__dict__ = experts.__dict__ | {name: dict(vars(experts)[name]) for name in own if name in vars(experts)}
    return made


def unmasked_experts(experts: Any) -> nn.Module:
    """The module that experts were, beside them and on the same memory; what is quantised stays as it is."""
    plain: Any = beside(experts)
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
            experts.__class__ = _masked_class(MaskedExperts, type(experts))
        prefix = f"{path}." if path else ""
        experts._watch = lambda part, rows, offsets, prefix=prefix: watch(f"{prefix}{part}", rows, offsets)
    try:
        yield
    finally:
        for experts, was_masked in watched:
            del experts._watch
            if not was_masked:
                experts.__class__ = experts._kind


# ---------------------------------------------------------------------------------------------- what they compute

Project = Callable[[str, Tensor, Tensor], Tensor]  # name of a projection, rows (T, K) sorted by expert, offsets (E,)


def experts_forward(experts: nn.Module, project: Project, *args: Any, **kwargs: Any) -> Tensor:
    """What experts, masked or not, compute of their forward's arguments, with ``project`` for each product."""
    return _FORWARDS.get(_name(experts), _routed)(experts, project, *args, **kwargs)


def project(experts: nn.Module, name: str, rows: Tensor, offsets: Tensor) -> Tensor:
    """A projection as it is: by its layer if there is one, or by the whole parameter."""
    layer = getattr(experts, name)
    if isinstance(layer, nn.Module):
        return layer(rows, offsets)
    projection = expert_projections(experts)[name]
    bias = None if projection.bias is None else getattr(experts, projection.bias)
    return unmasked_product(rows, layer, offsets, bias, projection.transposed)


def copies_of_tokens(experts: Any) -> int:
    """How often the first argument of experts has all tokens, (copies * T, H); 0: in the router's order, not theirs."""
    kind = _name(experts)
    return experts.num_experts if kind == "Llama4TextExperts" else int(kind != "JetMoeParallelExperts")


# ---------------------------------------------------------------------------------------------- private


def _name(experts: Any) -> str:
    """Of the class as transformers has it."""
    return getattr(experts, "_kind", type(experts)).__name__


def _parameter(tensor: Tensor) -> nn.Parameter:
    return tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor)


_CLASSES: dict[tuple[type, type], type[MaskedExperts]] = {}  # that were made, by the class that modules had


def _masked_class(masked: type[MaskedExperts], kind: type[nn.Module]) -> type[MaskedExperts]:
    if (masked, kind) not in _CLASSES:
        parts = {"_kind": kind, "_masked": masked, "__module__": __name__}
        name = masked.__name__.removesuffix("Experts") + kind.__name__
        _CLASSES[masked, kind] = type(name, (masked, kind), parts)
    return _CLASSES[masked, kind]


def _restored(masked: type[MaskedExperts], kind: type[nn.Module]) -> MaskedExperts:
    cls = _masked_class(masked, kind)
    return cls.__new__(cls)


def _routed(self: Any, project: Project, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """As transformers.integrations.moe.grouped_mm_experts_forward: hidden_states (T, H), the others (T, k)."""
    found = flags(self)
    assert found is not None, f"{_name(self)} has no forward of its own in _FORWARDS"
    rows = RoutedRows(top_k_index, self.num_experts)
    x = rows.of_experts(hidden_states)
    if found["has_gate"]:
        x = self._apply_gate(project("gate_up_proj", x, rows.offsets))
    else:
        x = self.act_fn(project("up_proj", x, rows.offsets))
    x = project("down_proj", x, rows.offsets)
    if found["has_post_expert_norm"]:
        x = self.post_expert_norm(x)
    return rows.of_tokens(x, top_k_weights).to(hidden_states.dtype)


def _llama4(self: Any, project: Project, hidden_states: Tensor) -> Tensor:
    """As Llama4TextExperts.forward: each expert has every token, (E * T, H)."""
    experts = self.num_experts
    ends = torch.arange(1, experts + 1, device=hidden_states.device, dtype=torch.int32)
    offsets = ends * (len(hidden_states) // experts)
    gate, up = project("gate_up_proj", hidden_states, offsets).chunk(2, dim=-1)
    return project("down_proj", up * self.act_fn(gate), offsets)


def _jetmoe(self: Any, project: Project, inputs: Tensor, expert_size: Any) -> Tensor:
    """As JetMoeParallelExperts.forward: expert_size says how many rows each expert has."""
    offsets = torch.as_tensor(expert_size, device=inputs.device).cumsum(0).int()
    return project("weight", inputs, offsets)


_FORWARDS: dict[str, Callable[..., Tensor]] = {"Llama4TextExperts": _llama4, "JetMoeParallelExperts": _jetmoe}
