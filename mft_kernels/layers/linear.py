"""MaskedLinear: a drop-in for nn.Linear that learns which weights to keep. Parameters and state, no mathematics."""

import torch
from torch import Tensor, nn

from ..mask.by_ratio import masked_linear_by_ratio
from ..mask.held import masked_linear_held
from ..ops.checks import NonFiniteScores
from ..ops.linear import masked_linear
from .maskable import why_no_mask
from .masked_layer import MaskedLayer
from .shells import linear_on


class MaskedLinear(MaskedLayer):
    """``y = x @ where(keep, weight, 0).T + bias``, which keeps the top ``keep_ratio`` of the weights by |scores|.

    Weight and bias are frozen, scores are trained. Their gradient passes straight through the comparison
    (arXiv 2503.22764). The mask is selected again when the scores have changed, not in every forward.

    Args:
        in_features, out_features, bias, device, dtype: see nn.Linear.
        keep_ratio: share of the weights that is kept, in [0, 1].
        mode: "magnitude" keeps the largest |scores|, "value" the largest scores.
        init: how scores start. "magnitude": |weight| scaled to a root mean square of 0.02, so that the first mask is
            the magnitude mask, except that weights of 0 are kept. "normal": N(0, 0.02), as in the paper, which uses it
            with keep_ratio 0.9; it drops weights at random. "constant": 0.02 with 1 % noise.
        scores_dtype: fp32 unless given (fp64 for an fp64 weight). 16-bit scores lose small updates to rounding, so
            they need an optimiser that rounds stochastically (MaskAdamW). int16 is fixed point (see fixed_point.py):
            autograd gives it no gradient, so it learns only through hold(). Casting the module does not change the
            scores' dtype.
        threshold: a fixed threshold instead of keep_ratio.
        pattern: where a keep_ratio holds. "matrix": in the whole matrix, and ties are all kept. "row": in each row, so
            that all outputs keep equally many inputs. "2:4" and "4:8": of each 4 (8) adjacent inputs 2 (4) are kept;
            keep_ratio must be 0.5. Except in "matrix", of equal scores those of the first columns are kept.
    Shapes: weight and scores (out_features, in_features), bias (out_features,); x (..., in_features).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        keep_ratio: float = 0.99,
        mode: str = "magnitude",
        init: str = "magnitude",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        scores_dtype: torch.dtype | None = None,
        threshold: float | None = None,
        pattern: str = "matrix",
    ) -> None:
        super().__init__()
        linear = nn.Linear(in_features, out_features, bias, device=device, dtype=dtype)
        self.in_features, self.out_features = in_features, out_features
        self._adopt(linear.weight, linear.bias, keep_ratio, mode, init, scores_dtype, threshold, None, pattern)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        keep_ratio: float = 0.99,
        mode: str = "magnitude",
        init: str = "magnitude",
        scores_dtype: torch.dtype | None = None,
        threshold: float | None = None,
        generator: torch.Generator | None = None,
        pattern: str = "matrix",
    ) -> "MaskedLinear":
        """Make a masked layer on the memory of ``linear``'s weight and bias, in its training mode.

        For the arguments see the class. ``generator`` draws the scores.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear must be an nn.Linear, got {type(linear).__name__}")
        why = why_no_mask(linear)
        if why is not None:
            raise ValueError(f"linear cannot be masked: {why}")
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._adopt(linear.weight, linear.bias, keep_ratio, mode, init, scores_dtype, threshold, generator, pattern)
        return self.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        if getattr(x, "is_nested", False):  # the op says what is wrong with other things than tensors
            return self._forward_nested(x)
        if self._held is not None:
            packed, grad_buffer, weight = self._held
            weight = self.weight if weight is None else weight
            return masked_linear_held(x, weight, packed, self.bias, grad_buffer=grad_buffer)
        if self._moving_threshold is not None and torch.compiler.is_dynamo_compiling():
            return masked_linear(x, self.weight, self.scores, self._moving_threshold, self.bias, mode=self.mode)
        try:
            return masked_linear_by_ratio(
                x,
                self.weight,
                self.scores,
                self.bias,
                keep_ratio=self._keep_ratio,
                threshold=self._threshold,
                mode=self.mode,
                pattern=self.pattern,
            )
        except NonFiniteScores as error:
            raise self._name_error(error) from None

    def _forward_nested(self, x: Tensor) -> Tensor:
        """Compute rows of several lengths, which nn.TransformerEncoder makes from a padded batch, as one batch."""
        rows = x.unbind()
        y = self.forward(torch.cat(rows))
        return torch.nested.as_nested_tensor(list(y.split([len(row) for row in rows])), layout=x.layout)

    @torch.no_grad()
    def merge(self, *, alpha: float = 1.0) -> nn.Linear:
        """Return an ordinary nn.Linear with the mask baked in: kept weights bit-equal, dropped ones +0. It is a copy.

        Args:
            alpha: see merged_weight; below 1, dropped weights are scaled by 1 - alpha.
        """
        bias = None if self.bias is None else nn.Parameter(self.bias.detach().clone())
        return linear_on(nn.Parameter(self.merged_weight(alpha=alpha)), bias).train(self.training)
