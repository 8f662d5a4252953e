"""MaskedGroupedLinear: MaskedLinear for experts whose weights are one parameter. No mathematics."""

import torch
from torch import Tensor

from ..mask.by_ratio import masked_linear_grouped_by_ratio
from ..mask.held import masked_linear_grouped_held
from ..ops.checks import NonFiniteScores, check_floating, check_tensor
from ..ops.grouped import masked_linear_grouped
from .masked_layer import MaskedLayer


class MaskedGroupedLinear(MaskedLayer):
    """``y[i] = x[i] @ where(keep[e], weight[e], 0).T + bias[e]`` for the rows i of expert e. Rows are sorted by expert.

    For models that store the experts of a mixture in one parameter. See masked_linear_grouped for rows and offsets.
    Each expert keeps ``keep_ratio`` of its own weights; a fixed threshold holds for all of them. Weight and bias are
    frozen, scores are trained.

    Args:
        weight: (E, N, K). The layer uses its memory, without a copy.
        bias: (E, N).
        transposed: if True, weight is (E, K, N), and y is x @ where(keep, weight, 0), without the .T.
        keep_ratio, mode, init, scores_dtype, threshold: see MaskedLinear.
        generator: draws the scores.
    Raises: ValueError or TypeError, naming the argument.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        transposed: bool = False,
        keep_ratio: float = 0.99,
        mode: str = "magnitude",
        init: str = "magnitude",
        scores_dtype: torch.dtype | None = None,
        threshold: float | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        layout = "(E, K, N)" if transposed else "(E, N, K)"
        check_tensor("weight", weight)
        check_floating("weight", weight)
        if weight.dim() != 3 or weight.shape[0] == 0:
            raise ValueError(f"weight must be {layout} of at least one expert, got shape {tuple(weight.shape)}")
        self.transposed = transposed
        self.experts, rows, columns = weight.shape
        self.out_features, self.in_features = (columns, rows) if transposed else (rows, columns)
        if bias is not None:
            check_tensor("bias", bias)
            if bias.shape != (self.experts, self.out_features):
                raise ValueError(f"bias must be {(self.experts, self.out_features)}, got {tuple(bias.shape)}")
        self._adopt(weight, bias, keep_ratio, mode, init, scores_dtype, threshold, generator)

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        """Return y (T, N) for x (T, K), sorted by expert, and offsets int32 (E,), where each expert's rows end."""
        if self._held is not None:
            packed, grad_buffer, weight = self._held
            given = self.weight if weight is None else weight
            return masked_linear_grouped_held(
                x, given, packed, offsets, self.bias, transposed=self.transposed, grad_buffer=grad_buffer
            )
        if self._moving_threshold is not None and torch.compiler.is_dynamo_compiling():
            threshold, options = self._moving_threshold, {"transposed": self.transposed, "mode": self.mode}
            return masked_linear_grouped(x, self.weight, self.scores, threshold, offsets, self.bias, **options)
        try:
            return masked_linear_grouped_by_ratio(
                x,
                self.weight,
                self.scores,
                offsets,
                self.bias,
                keep_ratio=self.keep_ratio,
                threshold=self._threshold,
                transposed=self.transposed,
                mode=self.mode,
            )
        except NonFiniteScores as error:
            raise self._name_error(error) from None

    def extra_repr(self) -> str:
        return f"experts={self.experts}, transposed={self.transposed}, {super().extra_repr()}"
