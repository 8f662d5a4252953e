"""Mixtures of experts as transformers stores them, each projection in one parameter, and the rows routed to experts.

Most classes use transformers' own interface (integrations/moe.py), whose flags tell the layout of the parameters. The
few others are recognised by name.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations import moe

_FLAGS = ("has_gate", "has_bias", "has_post_expert_norm", "is_transposed")  # of the interface
# Classes written like the interface's, but not under it: the flags that they would have.
_AS_THE_INTERFACE = {"Step3p7Experts": {"has_gate": True, "has_bias": False, "is_transposed": False}}
_OTHERS = {"Llama4TextExperts": True, "JetMoeParallelExperts": False}  # class name -> whether transposed


@dataclass(frozen=True)
class ExpertProjection:
    """A linear layer of all experts, as parameters of their module: weight (E, N, K), or (E, K, N) if transposed."""

    weight: str
    bias: str | None
    transposed: bool


def flags(module: nn.Module) -> dict[str, bool] | None:
    """Return the interface's flags of an experts module; None if the module does not use the interface."""
    known = _AS_THE_INTERFACE.get(class_name(module))
    if known is not None:
        return {name: known.get(name, False) for name in _FLAGS}
    if not all(isinstance(getattr(module, name, None), bool) for name in _FLAGS):
        return None
    return {name: getattr(module, name) for name in _FLAGS}


def expert_projections(module: nn.Module) -> dict[str, ExpertProjection]:
    """Return the maskable projections of an experts module, by parameter; empty for any other module."""
    found = flags(module)
    if found is not None:
        names = ["gate_up_proj" if found["has_gate"] else "up_proj", "down_proj"]
        projections = {
            name: ExpertProjection(name, f"{name}_bias" if found["has_bias"] else None, found["is_transposed"])
            for name in names
        }
    elif class_name(module) in _OTHERS:
        transposed = _OTHERS[class_name(module)]
        projections = {
            name: ExpertProjection(name, None, transposed) for name, _ in module.named_parameters(recurse=False)
        }
    else:
        return {}
    parameters: dict[str, Any] = module._parameters
    return {
        name: projection
        for name, projection in projections.items()
        if parameters.get(name) is not None and parameters[name].dim() == 3
    }


def unmasked_product(rows: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    """Compute a MaskedGroupedLinear with all weights kept, as transformers does. Rows of no expert are undefined."""
    of_rows = None if bias is None else bias_of_rows(bias, offsets, len(rows))
    return moe._grouped_linear(rows, weight, offsets, bias=of_rows, is_transposed=transposed)


def bias_of_rows(bias: Tensor, offsets: Tensor, rows: int) -> Tensor:
    """Return bias (E, N) as (rows, N): for each row its expert's."""
    places = torch.arange(rows, device=bias.device, dtype=offsets.dtype)
    return bias[torch.searchsorted(offsets, places, right=True).clamp_(max=len(offsets) - 1)]


class RoutedRows:
    """Rows for experts: one per (token, chosen expert) of top_k_index (T, k), sorted by expert.

    The order is stable, and gradients are summed in the order of a token's choices, so results repeat bit for bit.
    Indices >= num_experts mean no expert; those rows come last.
    """

    def __init__(self, top_k_index: Tensor, num_experts: int) -> None:
        self.top_k = top_k_index.shape[-1]
        chosen, self.order = top_k_index.reshape(-1).sort(stable=True)
        self.places = torch.empty_like(self.order)
        self.places[self.order] = torch.arange(len(self.order), device=self.order.device)
        experts = torch.arange(num_experts, device=chosen.device, dtype=chosen.dtype)
        self.offsets = torch.searchsorted(chosen, experts, right=True, out_int32=True)

    def expert_rows(self, hidden: Tensor) -> Tensor:
        """Return the tokens' hidden states (T, H) as rows (T * k, H), sorted by expert."""
        return _Gathered.apply(hidden, self.order, self.places, self.top_k)

    def token_sums(self, rows: Tensor, weights: Tensor) -> Tensor:
        """Return (T, H): for each token the sum of its rows, weighted by the router's weights (T, k)."""
        weighted = rows * weights.reshape(-1).index_select(0, self.order).unsqueeze(-1)
        placed = _Placed.apply(weighted, self.places, self.order)
        return placed.view(-1, self.top_k, rows.shape[-1]).sum(1)


def class_name(module: nn.Module) -> str:
    """Return the name of the module's class in transformers, masked or not."""
    return getattr(module, "_kind", type(module)).__name__


class _Gathered(torch.autograd.Function):
    """hidden[order // k]. On a GPU, the backward pass of indexing would add in an undefined order."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, order: Tensor, places: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(places)
        ctx.top_k = top_k
        return hidden.index_select(0, order // top_k)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (places,) = ctx.saved_tensors
        return grad.index_select(0, places).view(-1, ctx.top_k, grad.shape[-1]).sum(1), None, None, None


class _Placed(torch.autograd.Function):
    """rows[places], a permutation whose inverse is order."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, places: Tensor, order: Tensor) -> Tensor:
        ctx.save_for_backward(order)
        return rows.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (order,) = ctx.saved_tensors
        return grad.index_select(0, order), None, None
