"""Time what a caller waits for at few tokens, where the host may cost more than the kernel: eager, and in a graph.

Eager, calls follow each other between two synchronisations, by the clock: the larger of what the host and the device
need. In a graph the host needs nothing. What an eager call is slower by is what the layer costs the host. In each
replay a MaskedLinear selects, since something may have written into its scores; one whose mask is held does not.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mft_kernels import MaskedLinear, masked_linear

from ..rivals import KEEP_RATIO
from .cases import FUSED, Case
from .competitors import Inputs, Operands, difference, tolerance
from .device import Device
from .timing import FAILURES, reason, time_calls

DENSE_LAYER, LAYER, HELD_LAYER, OP = "nn.Linear", "MaskedLinear", "MaskedLinear, held", "masked_linear"
IN_GRAPH = ", in a graph"
_MOST_APART = tolerance(FUSED) or 0.0

Layer = Callable[[Tensor], Tensor]


def time_host(case: Case, inputs: Inputs, device: Device) -> dict[str, Any]:
    """samples and failures of one forward, each eager and in a graph; nothing asks for a gradient."""
    device.tidy()
    operands = inputs.get(case.n, case.k, case.m)
    calls: dict[str, Callable[[int], object]] = {}
    failures: dict[str, str] = {}
    with torch.no_grad():
        # A layer that was captured selects anew in each eager call too: it cannot know what a replay wrote.
        layers = {name + way: [make(o) for o in operands] for name, make in _MAKERS.items() for way in ("", IN_GRAPH)}
        # Its scores, as threshold, are those that the other masks were made of: all compute the same.
        masked = nn.functional.linear(operands[0].x, _masked(operands[0]))
        for name, copies in layers.items():
            try:
                dense = name.startswith(DENSE_LAYER)
                apart = 0.0 if dense else difference(copies[0](operands[0].x), masked)
            except FAILURES as error:
                failures[name] = reason(error, device)
                continue
            if apart > _MOST_APART:
                failures[name] = f"wrong: {apart:.3g} from the eager form, at most {_MOST_APART:g}"
                continue
            calls[name] = functools.partial(_on_copy, copies, operands)
        eager = frozenset(name for name in calls if not name.endswith(IN_GRAPH))
        samples, failed = time_calls(calls, len(operands), device, not_captured=frozenset(), by_the_clock=eager)
    return {"copies": len(operands), "samples": samples, "failures": {**failures, **failed}, "left_out": {}}


def dense_layer(o: Operands) -> nn.Linear:
    """On the operands' weight."""
    linear = nn.Linear(o.weight.shape[1], o.weight.shape[0], bias=False, device="meta", dtype=o.weight.dtype)
    linear.weight = nn.Parameter(o.weight, requires_grad=False)
    return linear


def masked_layer(o: Operands) -> MaskedLinear:
    """On the operands' weight, with a copy of their scores."""
    layer = MaskedLinear.from_linear(dense_layer(o), keep_ratio=KEEP_RATIO, scores_dtype=o.scores.dtype)
    with torch.no_grad():
        layer.scores.copy_(o.scores)
    return layer


def _on_copy(layers: list[Layer], operands: list[Operands], copy: int) -> Tensor:
    return layers[copy](operands[copy].x)


def _masked(o: Operands) -> Tensor:
    return torch.where(o.scores.abs() >= o.threshold, o.weight, 0)


def _held_layer(o: Operands) -> MaskedLinear:
    layer = masked_layer(o)
    layer.hold(o.packed)
    return layer


def _op(o: Operands) -> Layer:
    return lambda x: masked_linear(x, o.weight, o.scores, o.threshold)


_MAKERS: dict[str, Callable[[Operands], Layer]] = {
    DENSE_LAYER: dense_layer,
    LAYER: masked_layer,
    HELD_LAYER: _held_layer,
    OP: _op,
}
