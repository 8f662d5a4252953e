"""What scores learn by in place of the straight-through gradient, which treats the comparison as the identity.

With x = score - threshold (|score| - threshold in magnitude mode), sharpness k, N masked weights and s the sigmoid:

    forward     keep = x >= 0, as hard as ever
    backward    d_score = 4 s(k x) s(-k x) * (grad_keep * weight - penalty * k / (4 N)) * sign, sign 1 in value mode

The factor is the slope of s(k x) over its largest, so 1 at the threshold, where a score learns as before. The second
term is the gradient of the penalty, penalty * mean over the masked weights of s(-k x), a smooth share of what is
dropped: it pushes scores on both sides of the threshold to be kept.

k goes from its start to its end over the run, by the same factor each step: 1 / k is the width of the band of scores
that learn, which so narrows by the same share each step. (Linearly, most of it would be gone after a few steps.)
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mft.config import MaskConfig

_SURROGATE = "_mft_surrogate"  # an attribute of a model, or of PEFT's configuration
_ROWS = 256  # of a matrix in fp32 at once


@dataclass
class Surrogate:
    """Of one model's masks.

    sharpness: k, now; 1 / sharpness is a distance of scores from the threshold. weights: N, of all masks together.
    """

    start: float
    end: float
    penalty: float
    weights: int
    sharpness: float = 0.0

    def __post_init__(self) -> None:
        self.sharpness = self.sharpness or self.start

    def sharpen(self, step: int, steps: int) -> None:
        """What step, from 1, of so many learns by: start at the first, end at the last."""
        self.sharpness = self.start * (self.end / self.start) ** ((step - 1) / max(1, steps - 1))

    @property
    def pull(self) -> float:
        """By how much the penalty's gradient lowers that of a weight at the threshold."""
        return self.penalty * self.sharpness / (4 * self.weights)

    def gradient(self, grad: Tensor, scores: Tensor, *, threshold: float, mode: str, penalised: bool = True) -> Tensor:
        """The surrogate's, fp32, from the straight-through gradient d_scores; elementwise, of scores' shape.

        penalised: a step's gradient has the penalty's once, whatever it is the sum of.
        """
        wide, pull = scores.float(), self.pull if penalised else 0.0
        if mode == "magnitude":
            wanted = grad.float() - pull * wide.sign()
            z = self.sharpness * (wide.abs() - threshold)
        else:
            wanted = grad.float() - pull
            z = self.sharpness * (wide - threshold)
        return wanted * (4 * z.sigmoid() * (-z).sigmoid())

    @torch.no_grad()
    def replace(
        self, grad: Tensor, scores: Tensor, *, threshold: float, mode: str, weight: Tensor | None = None
    ) -> None:
        """Write the surrogate's gradient over grad, a few rows at a time and rounded once.

        Args:
            grad: (N, K), of experts (E, N, K): d_scores; with weight, of grad's shape, grad_output.T @ x.
            scores: of grad's shape, on its device.
        """
        for part, some, own in _rows(grad, scores, weight):
            straight = part.float()
            if own is not None:
                straight = straight * own
                straight = straight * some.float().sign() if mode == "magnitude" else straight
            part.copy_(self.gradient(straight, some, threshold=threshold, mode=mode))


def surrogate_of(holder: Any) -> Surrogate | None:
    """Of a masked model, or of an adapter's configuration in PEFT; None: the straight-through gradient."""
    return getattr(holder, _SURROGATE, None)


def keep_surrogate(holder: Any, mask: MaskConfig, weights: int) -> None:
    """surrogate_of(holder) is what mask asks for on so many masked weights, from now on."""
    setattr(holder, _SURROGATE, make_surrogate(mask, weights))


def forget_surrogate(holder: Any) -> None:
    """As if none had been asked for."""
    if hasattr(holder, _SURROGATE):
        delattr(holder, _SURROGATE)


def make_surrogate(mask: MaskConfig, weights: int) -> Surrogate | None:
    """What mask asks for on so many masked weights; None for the straight-through gradient."""
    if mask.sharpness is None:
        return None
    start, end = mask.sharpness if isinstance(mask.sharpness, tuple) else (mask.sharpness, mask.sharpness)
    return Surrogate(start, end, mask.deletion_penalty, weights)


def _rows(grad: Tensor, scores: Tensor, weight: Tensor | None) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """Some rows of each at a time; experts lie below each other."""
    grads, some = (tensor.flatten(0, -2).split(_ROWS) for tensor in (grad, scores))
    weights = [None] * len(grads) if weight is None else weight.flatten(0, -2).split(_ROWS)
    yield from zip(grads, some, weights, strict=True)
