"""The inputs of timed kernels: operands for a shape and a number of tokens, in more copies than the L2 cache holds."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mft_kernels import reference

from ..rivals import KEEP_RATIO
from .device import Device

MODE = "magnitude"


@dataclass(frozen=True)
class Operands:
    """bf16, contiguous: x (M, K), grad (M, N), weight and scores (N, K), threshold (), packed and signs as bits.

    sums: fp32 (N, K), the buffer that is added to; None if there is none.
    """

    x: Tensor
    grad: Tensor
    weight: Tensor
    scores: Tensor
    threshold: Tensor
    packed: Tensor
    signs: Tensor
    sums: Tensor | None = None

    def masked(self) -> Tensor:
        """Return the masked weight, computed by torch."""
        return torch.where(self.scores.abs() >= self.threshold, self.weight, 0)

    def to_add_to(self) -> Tensor:
        """``sums``, which must exist."""
        assert self.sums is not None, "what is accumulated needs operands with sums"
        return self.sums


class Inputs:
    """Operands on a device; those of the last shape and M are kept."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._generator = torch.Generator(device.torch_device).manual_seed(0)
        self._shape: tuple[int, int] | None = None
        self._layers: list[tuple[Tensor, ...]] = []
        self._tokens: tuple[int, int, int, bool] | None = None
        self._operands: list[Operands] = []

    def get(self, n: int, k: int, m: int, *, sums: bool = False) -> list[Operands]:
        """Return copies with equal values in separate memory; with ``sums``, each has a buffer."""
        if (n, k, m, sums) != self._tokens:
            self._operands, self._tokens = [], None
            layers = self._layers_of(n, k)
            count = min(len(layers), self.copies(2 * n * k + 2 * m * min(n, k)))
            x, grad = self._normal(m, k), self._normal(m, n)
            self._operands = [Operands(x.clone(), grad.clone(), *layer) for layer in layers[:count]]
            if sums:
                self._operands = [
                    replace(o, sums=torch.zeros_like(o.weight, dtype=torch.float32)) for o in self._operands
                ]
            self._tokens = (n, k, m, sums)
        return self._operands

    def copies(self, nbytes: int) -> int:
        """Return the number of copies of this size: four caches between two uses of one copy, so that it is evicted."""
        return max(1, math.ceil(4 * self._device.l2_bytes / nbytes))

    def _layers_of(self, n: int, k: int) -> list[tuple[Tensor, ...]]:
        if (n, k) != self._shape:
            self._layers, self._shape = [], None
            weight, scores = 0.02 * self._normal(n, k), 0.02 * self._normal(n, k)
            dropped = int((1 - KEEP_RATIO) * scores.numel())
            threshold = scores.abs().flatten().sort().values[dropped].clone()  # by no measured kernel
            packed = reference.pack_mask(scores, threshold, MODE)
            signs = reference.pack_signs(scores)[0]
            layer = (weight, scores, threshold, packed, signs)
            others = range(self.copies(weight.nbytes) - 1)
            self._layers = [layer, *(tuple(t.clone() for t in layer) for _ in others)]
            self._shape = (n, k)
        return self._layers

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator, device=self._device.torch_device).to(torch.bfloat16)
