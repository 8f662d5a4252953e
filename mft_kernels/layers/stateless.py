"""Layers without state for the Kernel Hub: kernelize gives their forward to modules of other classes.

Each class is a forward alone. Its annotations are the members that the module must have (docs/how-to/kernel-hub.md).
"""

from typing import Any

from torch import Tensor, nn

from ..mask.by_ratio import masked_linear_by_ratio
from ..mask.held import masked_linear_held


class MaskedLinear(nn.Module):
    """``y = x @ where(keep, weight, 0).T + bias``, with the result and the gradients of mft_kernels.MaskedLinear.

    The module must have these members: weight (N, K), bias (N,) or None, scores (N, K), keep_ratio, threshold and mode.
    It may have a pattern. An mft_kernels.MaskedLinear may also use hold().
    Shapes: x (..., K), not nested. The result is (..., N) in x's dtype.
    """

    can_torch_compile: bool = True
    weight: Tensor
    bias: Tensor | None
    scores: Tensor
    keep_ratio: float
    threshold: float | None
    mode: str
    _held: Any

    def forward(self, x: Tensor) -> Tensor:
        held = getattr(self, "_held", None)
        if held is not None:
            packed, grad_buffer, weight = held
            weight = self.weight if weight is None else weight
            return masked_linear_held(x, weight, packed, self.bias, grad_buffer=grad_buffer)
        return masked_linear_by_ratio(
            x,
            self.weight,
            self.scores,
            self.bias,
            keep_ratio=self.keep_ratio,
            threshold=self.threshold,
            mode=self.mode,
            pattern=getattr(self, "pattern", "matrix"),
        )
