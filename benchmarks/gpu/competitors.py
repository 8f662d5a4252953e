"""Who is timed: for each product, functions of the same operands, and how far each may be from the eager form."""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from mft_kernels import reference
from mft_kernels.eager import eager_grad_scores, eager_grad_x, eager_linear, eager_step

from ..rivals import KEEP_RATIO, paper_linear
from . import two_passes
from .cases import AUTO, COMPILED, CUDA, DENSE, EAGER, FUSED, KEPT, PACKED, PAPER, PASS
from .device import Device
from .kernels import kernels

MODE = "magnitude"
_D_X = [True, False, False, False]
_D_SCORES = [False, False, True, False]
_BOTH = [True, False, True, False]

#: Bytes that tell one weight's mask.
KEEP_BYTES = {DENSE: 0.0, PACKED: 1 / 8}
SCORE_BYTES = 2.0
#: Largest ||difference|| / ||eager||. bf16 rounds by 0.2 %. The paper's sort drops some of the scores that tie with the
#: threshold and are kept here, about one weight in 300.
_TOLERANCE = {PAPER: 0.25}
_TOLERANCE_ELSEWHERE = 0.02
#: Autograd and indexing by a tensor of the host: not for a graph.
NOT_CAPTURED = frozenset({PAPER})


@dataclass(frozen=True)
class Operands:
    """bf16, contiguous: x (M, K), grad (M, N), weight and scores (N, K), threshold (), packed and signs as bits.

    sums: fp32 (N, K), what "accumulate" adds to; None elsewhere.
    """

    x: Tensor
    grad: Tensor
    weight: Tensor
    scores: Tensor
    threshold: Tensor
    packed: Tensor
    signs: Tensor
    sums: Tensor | None = None


class Inputs:
    """Operands of a shape and M on a device, as many copies as the L2 cache cannot hold; those of the last are kept."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._generator = torch.Generator(device.torch_device).manual_seed(0)
        self._shape: tuple[int, int] | None = None
        self._layers: list[tuple[Tensor, ...]] = []
        self._tokens: tuple[int, int, int, bool] | None = None
        self._operands: list[Operands] = []

    def get(self, n: int, k: int, m: int, *, sums: bool = False) -> list[Operands]:
        """Equal in value, apart in memory; with ``sums`` a buffer each for "accumulate"."""
        if (n, k, m, sums) != self._tokens:
            self._operands, self._tokens = [], None
            layers = self._layers_of(n, k)
            count = min(len(layers), self._copies(2 * n * k + 2 * m * min(n, k)))
            x, grad = self._normal(m, k), self._normal(m, n)
            self._operands = [Operands(x.clone(), grad.clone(), *layer) for layer in layers[:count]]
            if sums:
                self._operands = [
                    replace(o, sums=torch.zeros_like(o.weight, dtype=torch.float32)) for o in self._operands
                ]
            self._tokens = (n, k, m, sums)
        return self._operands

    def _layers_of(self, n: int, k: int) -> list[tuple[Tensor, ...]]:
        if (n, k) != self._shape:
            self._layers, self._shape = [], None
            weight, scores = 0.02 * self._normal(n, k), 0.02 * self._normal(n, k)
            dropped = int((1 - KEEP_RATIO) * scores.numel())
            threshold = scores.abs().flatten().sort().values[dropped].clone()  # none of the kernels that are measured
            packed = reference.pack_mask(scores, threshold, MODE)
            signs = reference.pack_signs(scores)[0]
            layer = (weight, scores, threshold, packed, signs)
            copies = self._copies(weight.nbytes)
            self._layers = [layer, *(tuple(t.clone() for t in layer) for _ in range(copies - 1))]
            self._shape = (n, k)
        return self._layers

    def _copies(self, nbytes: int) -> int:
        # Four caches between two uses of a copy: what is read then was written over long ago.
        return max(1, math.ceil(4 * self._device.l2_bytes / nbytes))

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator, device=self._device.torch_device).to(torch.bfloat16)


Run = Callable[[Operands], Tensor | tuple[Tensor, ...]]


def functions(what: str, names: Sequence[str], device: Device) -> dict[str, Run]:
    """The named competitors for one of cases.PRODUCTS, but those that the device is without."""
    return {name: _function(what, name, device) for name in names if name not in device.without}


def tolerance(name: str) -> float | None:
    """Largest relative difference from the eager form; None where there is none to be had."""
    return None if name == DENSE else _TOLERANCE.get(name, _TOLERANCE_ELSEWHERE)


def difference(got: Tensor | tuple[Tensor, ...], expected: Tensor | tuple[Tensor, ...]) -> float:
    """||got - expected|| / ||expected||, the largest of all outputs; NaN counts as infinity."""
    shares = [
        ((g.float() - e.float()).norm() / e.float().norm()).item() for g, e in zip(outputs(got), outputs(expected))
    ]
    return max(math.inf if math.isnan(share) else share for share in shares)


def outputs(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Of one product or a step, as a tuple."""
    return (result,) if isinstance(result, Tensor) else tuple(result)


def _function(what: str, name: str, device: Device) -> Run:
    if name == COMPILED:
        compiled = device.compile(_PLAIN[what])
        return lambda o: compiled(*_arguments(what, o))
    if name == EAGER:
        return lambda o: _PLAIN[what](*_arguments(what, o))
    return _TABLE[what][name]


def _eager_accumulate(grad: Tensor, x: Tensor, weight: Tensor, scores: Tensor, sums: Tensor) -> Tensor:
    return sums.add_(eager_grad_scores(grad, x, weight, scores))


_PLAIN: dict[str, Callable] = {
    "forward": eager_linear,
    "d_x": eager_grad_x,
    "d_scores": eager_grad_scores,
    "accumulate": _eager_accumulate,
    "step": eager_step,
}


def _arguments(what: str, o: Operands) -> tuple[Tensor, ...]:
    return {
        "forward": (o.x, o.weight, o.scores, o.threshold),
        "d_x": (o.grad, o.weight, o.scores, o.threshold),
        "d_scores": (o.grad, o.x, o.weight, o.scores),
        "accumulate": (o.grad, o.x, o.weight, o.scores, o.sums),
        "step": (o.grad, o.x, o.weight, o.scores, o.threshold),
    }[what]


def _forward(o: Operands, by: str) -> Tensor:
    return kernels(by).masked_linear(o.x, o.weight, o.scores, o.threshold, None, MODE)


def _forward_packed(o: Operands) -> Tensor:
    return kernels(FUSED).masked_linear_packed(o.x, o.weight, o.packed, None)


def _backward(o: Operands, by: str, wanted: list[bool]) -> tuple[Tensor, ...]:
    return kernels(by).masked_linear_backward(o.grad, o.x, o.weight, o.scores, o.threshold, MODE, wanted)


def _backward_packed(o: Operands, wanted: list[bool]) -> tuple[Tensor, ...]:
    # As in MaskedLinear: scores give the dtype of their gradient, bits the sign.
    return kernels(FUSED).masked_linear_packed_backward(
        o.grad, o.x, o.weight, o.packed, o.scores, o.signs, MODE, wanted
    )


def _d_x(o: Operands, by: str) -> Tensor:
    return _backward(o, by, _D_X)[0]


def _d_scores(o: Operands, by: str) -> Tensor:
    return _backward(o, by, _D_SCORES)[2]


def _accumulate(o: Operands, by: str) -> Tensor:
    kernels(by).accumulate_score_grad(o.sums, o.grad, o.x, o.weight, o.scores, None, MODE)
    return _sums(o)


def _sums(o: Operands) -> Tensor:
    assert o.sums is not None, "accumulate needs operands with sums"
    return o.sums


def _step(o: Operands, by: str) -> tuple[Tensor, ...]:
    y = _forward(o, by)
    d_x, _, d_scores, _ = _backward(o, by, _BOTH)
    return y, d_x, d_scores


def _step_packed(o: Operands) -> tuple[Tensor, ...]:
    y = _forward_packed(o)
    d_x, _, d_scores, _ = _backward_packed(o, _BOTH)
    return y, d_x, d_scores


def _step_in_passes(o: Operands, keep_masked: bool) -> tuple[Tensor, ...]:
    return two_passes.step(o.grad, o.x, o.weight, o.scores, o.threshold, keep_masked=keep_masked)


def _step_of_paper(o: Operands) -> tuple[Tensor, ...]:
    x, scores = o.x.detach().requires_grad_(), o.scores.detach().requires_grad_()
    y = paper_linear(x, o.weight, scores)
    d_x, d_scores = torch.autograd.grad(y, (x, scores), o.grad)
    return y.detach(), d_x, d_scores


def _by(run: Callable, *names: str) -> dict[str, Run]:
    """``run`` takes operands and by whose kernels."""
    return {name: functools.partial(run, by=name) for name in names}


_TABLE: dict[str, dict[str, Run]] = {
    "forward": {
        DENSE: lambda o: F.linear(o.x, o.weight),
        PACKED: _forward_packed,
        PASS: lambda o: F.linear(o.x, two_passes.mask(o.weight, o.scores, o.threshold)),
        **_by(_forward, FUSED, AUTO, CUDA),
    },
    "d_x": {
        DENSE: lambda o: o.grad @ o.weight,
        PACKED: lambda o: _backward_packed(o, _D_X)[0],
        PASS: lambda o: o.grad @ two_passes.mask(o.weight, o.scores, o.threshold),
        **_by(_d_x, FUSED, AUTO, CUDA),
    },
    "d_scores": {
        DENSE: lambda o: o.grad.T @ o.x,
        PACKED: lambda o: _backward_packed(o, _D_SCORES)[2],
        PASS: lambda o: two_passes.grad_scores(o.grad, o.x, o.weight, o.scores),
        **_by(_d_scores, FUSED, CUDA),
    },
    "accumulate": {
        DENSE: lambda o: _sums(o).add_(o.grad.T @ o.x),
        PASS: lambda o: _sums(o).add_(two_passes.grad_scores(o.grad, o.x, o.weight, o.scores)),
        **_by(_accumulate, FUSED, CUDA),
    },
    "step": {
        DENSE: lambda o: (F.linear(o.x, o.weight), o.grad @ o.weight, o.grad.T @ o.x),
        PACKED: _step_packed,
        PASS: functools.partial(_step_in_passes, keep_masked=False),
        KEPT: functools.partial(_step_in_passes, keep_masked=True),
        PAPER: _step_of_paper,
        **_by(_step, FUSED, AUTO, CUDA),
    },
}
