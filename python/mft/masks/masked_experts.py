"""MaskedExperts: transformers' mixture of experts with masks on its projections, each of which is one parameter.

The module keeps its place, state and methods. Its class becomes a subclass of MaskedExperts and of its original class.
A masked projection is a MaskedGroupedLinear with the parameter's name: "experts.gate_up_proj.scores".
"""

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mft.models.routed_experts import (
    ExpertProjection,
    RoutedRows,
    class_name,
    expert_projections,
    flags,
    unmasked_product,
)


class MaskedExperts(nn.Module):
    """Base class of experts after mask_experts: the same function of the inputs, with masks applied.

    A class that uses transformers' experts interface computes as that interface's "grouped_mm" does, whatever
    config._experts_implementation says: rows sorted by expert, one product per projection over all experts. Sums and
    gradients have a fixed order, so results repeat bit for bit.
    """

    _kind: type[nn.Module]  # the module's original class
    _masked: type["MaskedExperts"]  # this class, or the subclass that the module's class derives from
    _projections: dict[str, ExpertProjection]  # the masked parameters
    _order: list[str]  # names of the original parameters, in order
    _watch: Callable[[str, Tensor, Tensor], None] | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return experts_forward(self, self._project, *args, **kwargs)

    def _project(self, name: str, rows: Tensor, offsets: Tensor) -> Tensor:
        if self._watch is not None:
            self._watch(name, rows, offsets)
        return project(self, name, rows, offsets)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # pickle cannot name the class, because it is made at run time.
        return _restored, (self._masked, self._kind), self.__dict__


def mask_experts(
    experts: Any, name: str, mask: Callable[..., nn.Module], masked: type[MaskedExperts] = MaskedExperts
) -> Any:
    """Replace the parameter ``name`` of experts by the layer mask(weight, bias, transposed=...), in place.

    The class of experts becomes a subclass of ``masked``. The layer is called with rows sorted by expert and their
    offsets. Returns: the layer.
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
    """Put weight (and bias) back as the parameter ``name``. Removing the last mask restores the original class."""
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


Layout = tuple[type, dict[str, Any]]


def layout(experts: Any) -> Layout:
    """Return the class, parameters and masked layers of experts, for restore_layout."""
    return type(experts), {name: copy.copy(part) for name, part in vars(experts).items() if name in _LAYOUT}


def restore_layout(experts: Any, saved: Layout) -> None:
    """Undo all mask_experts and unmask_experts since ``saved``, also those that an exception stopped midway."""
    kind, parts = saved
    vars(experts).update({name: copy.copy(part) for name, part in parts.items()})
    experts.__class__ = kind


def share_experts(experts: Any) -> nn.Module:
    """Return a copy of experts, masked or not, that shares its tensors. A mask on one does not affect the other."""
    made = copy.copy(experts)
    made.__dict__ = experts.__dict__ | layout(experts)[1]
    return made


@contextlib.contextmanager
def watch_experts(model: nn.Module, watch: Callable[[str, Tensor, Tensor], None]) -> Iterator[None]:
    """Call watch(name, rows, offsets) in this context for the rows (T, K) that reach a projection, masked or not."""
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


# ---------------------------------------------------------------------------------------------- the forward

Project = Callable[[str, Tensor, Tensor], Tensor]  # name of a projection, rows (T, K) sorted by expert, offsets (E,)


def experts_forward(experts: nn.Module, project: Project, *args: Any, **kwargs: Any) -> Tensor:
    """Run the forward of experts, masked or not, with ``project`` for each product."""
    return _FORWARDS.get(class_name(experts), _routed)(experts, project, *args, **kwargs)


def project(experts: nn.Module, name: str, rows: Tensor, offsets: Tensor) -> Tensor:
    """Compute a projection with its layer if it has one, else with the whole parameter."""
    layer = getattr(experts, name)
    if isinstance(layer, nn.Module):
        return layer(rows, offsets)
    projection = expert_projections(experts)[name]
    bias = None if projection.bias is None else getattr(experts, projection.bias)
    return unmasked_product(rows, layer, offsets, bias, projection.transposed)


def copies_of_tokens(experts: Any) -> int:
    """Return how often the experts' first input (copies * T, H) has all tokens; 0 if it is in the router's order."""
    kind = class_name(experts)
    return experts.num_experts if kind == "Llama4TextExperts" else int(kind != "JetMoeParallelExperts")


# ---------------------------------------------------------------------------------------------- private


def _parameter(tensor: Tensor) -> nn.Parameter:
    return tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor)


_LAYOUT = ("_parameters", "_modules", "_projections", "_order")  # what mask_experts changes, besides the class
_CLASSES: dict[tuple[type, type], type[MaskedExperts]] = {}  # by (MaskedExperts class, original class)


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
    """Compute as transformers.integrations.moe.grouped_mm_experts_forward: hidden_states (T, H), the others (T, k)."""
    found = flags(self)
    assert found is not None, f"{class_name(self)} has no forward of its own in _FORWARDS"
    rows = RoutedRows(top_k_index, self.num_experts)
    x = rows.expert_rows(hidden_states)
    if found["has_gate"]:
        x = self._apply_gate(project("gate_up_proj", x, rows.offsets))
    else:
        x = self.act_fn(project("up_proj", x, rows.offsets))
    x = project("down_proj", x, rows.offsets)
    if found["has_post_expert_norm"]:
        x = self.post_expert_norm(x)
    return rows.token_sums(x, top_k_weights).to(hidden_states.dtype)


def _llama4(self: Any, project: Project, hidden_states: Tensor) -> Tensor:
    """Compute as Llama4TextExperts.forward: each expert gets every token, (E * T, H)."""
    experts = self.num_experts
    ends = torch.arange(1, experts + 1, device=hidden_states.device, dtype=torch.int32)
    offsets = ends * (len(hidden_states) // experts)
    gate, up = project("gate_up_proj", hidden_states, offsets).chunk(2, dim=-1)
    return project("down_proj", up * self.act_fn(gate), offsets)


def _jetmoe(self: Any, project: Project, inputs: Tensor, expert_size: Any) -> Tensor:
    """Compute as JetMoeParallelExperts.forward: expert_size is the number of rows of each expert."""
    offsets = torch.as_tensor(expert_size, device=inputs.device).cumsum(0).int()
    return project("weight", inputs, offsets)


_FORWARDS: dict[str, Callable[..., Tensor]] = {"Llama4TextExperts": _llama4, "JetMoeParallelExperts": _jetmoe}
