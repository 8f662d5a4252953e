"""Every way to compute the products of a layer, and a whole step of it: functions of the same operands."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mft_kernels import MaskedLinear, masked_linear
from mft_kernels.backends.triton import ops
from mft_kernels.eager import eager_grad_scores, eager_grad_x, eager_linear, eager_step
from mft_kernels.operands import Keep

from ..rivals import KEEP_RATIO
from .cases import (
    AUTO,
    AUTO_PACKED,
    CUDA,
    CUDA_PACKED,
    DENSE,
    EAGER,
    FUSED,
    PACKED,
    PASS,
    PLACE,
)
from .device import Device
from .operands import MODE, Operands


class Way:
    """One way to compute the products, with methods named as in cases.PRODUCTS. A way may lack some of them."""

    forward: Callable[[Operands], Tensor]
    d_x: Callable[[Operands], Tensor]
    d_scores: Callable[[Operands], Tensor]

    def accumulate(self, o: Operands) -> Tensor:
        """Add d_scores to the sums and return them."""
        return o.to_add_to().add_(self.d_scores(o))

    def step(self, o: Operands) -> tuple[Tensor, ...]:
        """Return (y, d_x, d_scores)."""
        return self.forward(o), self.d_x(o), self.d_scores(o)


class Dense(Way):
    """The unmasked layer; its d_scores is the gradient of the weight."""

    def forward(self, o: Operands) -> Tensor:
        return F.linear(o.x, o.weight)

    def d_x(self, o: Operands) -> Tensor:
        return o.grad @ o.weight

    def d_scores(self, o: Operands) -> Tensor:
        return o.grad.T @ o.x

    def accumulate_product(self, o: Operands) -> Tensor:
        return self.accumulate(o)


class Place(Dense):
    """The same over weights that hold their masks."""

    def hold(self, every: Sequence[Operands]) -> None:
        """Make the masked weights of these operands, which live as long as a case: a capture would repeat it."""
        self._held = {id(o): replace(o, weight=o.masked()) for o in every}

    def forward(self, o: Operands) -> Tensor:
        return super().forward(self._held[id(o)])

    def d_x(self, o: Operands) -> Tensor:
        return super().d_x(self._held[id(o)])


class Eager(Way):
    """PyTorch's own ops."""

    def forward(self, o: Operands) -> Tensor:
        return eager_linear(o.x, o.weight, o.scores, o.threshold)

    def d_x(self, o: Operands) -> Tensor:
        return eager_grad_x(o.grad, o.weight, o.scores, o.threshold)

    def d_scores(self, o: Operands) -> Tensor:
        return eager_grad_scores(o.grad, o.x, o.weight, o.scores)

    def step(self, o: Operands) -> tuple[Tensor, ...]:
        return eager_step(o.grad, o.x, o.weight, o.scores, o.threshold)


class Ours(Way):
    """The kernels of a backend, from the scores."""

    def __init__(self, backend: str) -> None:
        self._backend = backend

    def forward(self, o: Operands) -> Tensor:
        return torch.ops.mft.masked_linear(o.x, o.weight, o.scores, o.threshold, None, MODE, self._backend)

    def d_x(self, o: Operands) -> Tensor:
        return self._gradients(o, [True, False, False, False])[0]

    def d_scores(self, o: Operands) -> Tensor:
        return self._gradients(o, [False, False, True, False])[2]

    def accumulate(self, o: Operands) -> Tensor:
        return self._add(o, o.weight, o.signs)

    def accumulate_product(self, o: Operands) -> Tensor:
        return self._add(o, None, None)

    def step(self, o: Operands) -> tuple[Tensor, ...]:
        y = self.forward(o)
        d_x, _, d_scores, _ = self._gradients(o, [True, False, True, False])
        return y, d_x, d_scores

    def _gradients(self, o: Operands, wanted: list[bool]) -> tuple[Tensor, ...]:
        by = (o.scores, o.threshold, MODE, wanted, self._backend)
        return torch.ops.mft.masked_linear_backward(o.grad, o.x, o.weight, *by)

    def _add(self, o: Operands, weight: Tensor | None, signs: Tensor | None) -> Tensor:
        """Add into fp32 sums, as layers do, with packed signs."""
        sums = o.to_add_to()
        torch.ops.mft.accumulate_score_grad(sums, o.grad, o.x, weight, None, signs, MODE, self._backend)
        return sums


class Packed(Ours):
    """The same from bits. As in MaskedLinear, scores give the dtype of their gradient, bits the sign."""

    def forward(self, o: Operands) -> Tensor:
        return torch.ops.mft.masked_linear_packed(o.x, o.weight, o.packed, None, self._backend)

    def _gradients(self, o: Operands, wanted: list[bool]) -> tuple[Tensor, ...]:
        by = (o.packed, o.scores, o.signs, MODE, wanted, self._backend)
        return torch.ops.mft.masked_linear_packed_backward(o.grad, o.x, o.weight, *by)


class Passes(Ours):
    """Triton's other way to y and d_x: a mask pass into scratch memory, and torch's product."""

    def forward(self, o: Operands) -> Tensor:
        return ops.product(o.x, o.weight, Keep(o.scores, o.threshold, MODE), None, choose=ops.always_scratch)

    def d_x(self, o: Operands) -> Tensor:
        keep = Keep(o.scores, o.threshold, MODE)
        return ops.product(o.grad, o.weight, keep, None, transposed=True, choose=ops.always_scratch)

    step = Way.step


class Layer(Way):
    """A module on the operands' weight, as users call it."""

    def __init__(self, make: Callable[[Operands], nn.Module]) -> None:
        self._make = make
        self._made: dict[int, nn.Module] = {}  # by the operands, which live as long as a case

    def forward(self, o: Operands) -> Tensor:
        return self._of(o)(o.x)

    def _of(self, o: Operands) -> nn.Module:
        if id(o) not in self._made:
            self._made[id(o)] = self._make(o)
        return self._made[id(o)]


class Op(Way):
    """The public function, which checks its arguments."""

    def forward(self, o: Operands) -> Tensor:
        return masked_linear(o.x, o.weight, o.scores, o.threshold)


def dense_layer(o: Operands) -> nn.Linear:
    """Return an nn.Linear."""
    linear = nn.Linear(o.weight.shape[1], o.weight.shape[0], bias=False, device="meta", dtype=o.weight.dtype)
    linear.weight = nn.Parameter(o.weight, requires_grad=False)
    return linear


def masked_layer(o: Operands) -> MaskedLinear:
    """Return a MaskedLinear with a copy of the scores."""
    layer = MaskedLinear.from_linear(dense_layer(o), keep_ratio=KEEP_RATIO, scores_dtype=o.scores.dtype)
    with torch.no_grad():
        layer.scores.copy_(o.scores)
    return layer


def held_layer(o: Operands) -> MaskedLinear:
    """Return a MaskedLinear that holds its mask."""
    layer = masked_layer(o)
    layer.scores.requires_grad_(False)
    layer.hold(o.packed, None)
    return layer


def way_of(name: str, device: Device) -> Way:
    """Return the way of a competitor."""
    made: dict[str, Callable[[], Way]] = {
        DENSE: Dense,
        PLACE: Place,
        **{by: lambda by=by: Ours(device.backends[by]) for by in (FUSED, AUTO, CUDA)},
        **{
            name: lambda by=by: Packed(device.backends[by])
            for name, by in ((PACKED, FUSED), (CUDA_PACKED, CUDA), (AUTO_PACKED, AUTO))
        },
        PASS: lambda: Passes(device.backends[FUSED]),
        EAGER: Eager,
    }
    return made[name]()
