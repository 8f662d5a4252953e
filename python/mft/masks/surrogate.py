"""The surrogate gradient of scores. It replaces the straight-through gradient, which treats the comparison as identity.

With x = score - threshold (|score| - threshold in magnitude mode), sharpness k, N masked weights and s the sigmoid:

    forward     keep = x >= 0, unchanged
    backward    d_score = 4 s(k x) s(-k x) * (grad_keep * weight - penalty * k / (4 N)) * sign, sign 1 in value mode

The factor 4 s(k x) s(-k x) is the slope of s(k x) relative to its largest slope. It is 1 at the threshold, where the
score gets the straight-through gradient. The second term is the gradient of penalty * mean of s(-k x) over the masked
weights, a smooth share of dropped weights. It pushes scores on both sides of the threshold to be kept.

k goes from its start to its end over the run by the same factor in each step. 1 / k is the width of the band of scores
that learn, so the band narrows by the same share in each step. (With linear steps, most of it would be gone after a few
steps.)
"""

from dataclasses import dataclass
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mft.config import MaskConfig
from mft.models.attached import attached

_ROWS = 256  # rows of a matrix that are in fp32 at once


@dataclass
class Surrogate:
    """The surrogate gradient of one model's masks.

    sharpness: the present k; 1 / sharpness is a distance of scores from the threshold. weights: N, of all masks.
    """

    start: float
    end: float
    penalty: float
    weights: int
    sharpness: float = 0.0

    def __post_init__(self) -> None:
        self.sharpness = self.sharpness or self.start

    def sharpen(self, step: int, steps: int) -> None:
        """Set the sharpness for a step, counted from 1: start at the first step, end at the last."""
        self.sharpness = self.start * (self.end / self.start) ** ((step - 1) / max(1, steps - 1))

    @property
    def pull(self) -> float:
        """The amount by which the penalty lowers the gradient of a score at the threshold."""
        return self.penalty * self.sharpness / (4 * self.weights)

    def gradient(self, grad: Tensor, scores: Tensor, *, threshold: float, mode: str, penalised: bool = True) -> Tensor:
        """Return the surrogate gradient, fp32, computed elementwise from grad, the straight-through d_scores.

        penalised: whether to add the penalty's gradient. It must be added once per step, also if gradients of several
            batches are summed.
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
        """Overwrite grad with the surrogate gradient, a few rows at a time; it is rounded once.

        grad: d_scores, (N, K) or (E, N, K); or grad_output.T @ x if weight is given. scores, weight: in grad's shape.
        """
        # A few rows at a time; experts are flattened into rows.
        grads, rows = (tensor.flatten(0, -2).split(_ROWS) for tensor in (grad, scores))
        weights = [None] * len(grads) if weight is None else weight.flatten(0, -2).split(_ROWS)
        for part, some, own in zip(grads, rows, weights, strict=True):
            straight = part.float()
            if own is not None:
                straight = straight * own
                straight = straight * some.float().sign() if mode == "magnitude" else straight
            part.copy_(self.gradient(straight, some, threshold=threshold, mode=mode))


def surrogate_of(holder: Any) -> Surrogate | None:
    """Return the surrogate of a masked model or of an adapter's PEFT configuration; None: straight-through gradient."""
    return attached(holder).surrogate


def make_surrogate(mask: MaskConfig, weights: int) -> Surrogate | None:
    """Return the surrogate that mask asks for N = weights; None for the straight-through gradient."""
    if mask.sharpness is None:
        return None
    start, end = mask.sharpness if isinstance(mask.sharpness, tuple) else (mask.sharpness, mask.sharpness)
    return Surrogate(start, end, mask.deletion_penalty, weights)


class SurrogateHook:
    """A hook on scores that autograd trains. It replaces their gradient by the surrogate gradient.

    The penalty is added in the first backward pass of a step, which is the one that finds no .grad. Therefore gradients
    must be set to None between steps (zero_grad's default), not to zeros, and the loss must not be scaled, as fp16
    training does.
    """

    __torch_unserializable__ = True  # a new hook is made when scores are loaded

    def __init__(self, scores: nn.Parameter, surrogate: Surrogate, threshold: float, mode: str) -> None:
        self._scores = ref(scores)  # weak, because the scores hold the hook
        self._surrogate, self._threshold, self._mode = surrogate, threshold, mode

    def __call__(self, grad: Tensor) -> Tensor:
        scores = self._scores()
        assert scores is not None, "whose gradient it is"
        first = scores.grad is None
        rule: dict[str, Any] = {"threshold": self._threshold, "mode": self._mode}
        return self._surrogate.gradient(grad, scores, **rule, penalised=first).to(grad.dtype)


def hook_scores(
    scores: nn.Parameter, surrogate: Surrogate, *, threshold: float | None, mode: str
) -> RemovableHandle | None:
    """Add a SurrogateHook to scores; return None if they have one. Raises: ValueError without a threshold."""
    if any(isinstance(hook, SurrogateHook) for hook in (scores._backward_hooks or {}).values()):
        return None
    if threshold is None:
        raise ValueError(
            "threshold must be a number with mask.sharpness, which is measured from the threshold, got None"
        )
    return scores.register_hook(SurrogateHook(scores, surrogate, threshold, mode))
