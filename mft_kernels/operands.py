"""The operands that an op passes to a backend: a weight, and what tells which of its elements are kept.

A weight is a matrix (a tensor), codes that stand for one (codes.py), or the matrices of experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .codes import Codes

MODES = ("magnitude", "value")
PATTERNS = ("matrix", "row", "2:4", "4:8")  # of a keep ratio; see reference.pattern_mask
MOST_MASKS = 16  # in a product with one mask per row: a kernel takes the address of each mask


@dataclass(frozen=True)
class Keep:
    """Scores with the thresholds that they are compared with, or a packed mask.

    Attributes:
        source: scores of the weight's shape, (N, K) or (E, N, K); or int32 words, (N, ceil(K / 32)) or
            (E, N, ceil(K / 32)), see pack_mask.
        thresholds: in the scores' dtype: () for all; (N,), one per row; or (E,) for experts. None: source is words.
        mode: "magnitude" or "value", see masked_linear; "packed" for words.
    """

    source: Tensor
    thresholds: Tensor | None = None
    mode: str = "packed"

    @property
    def words(self) -> Tensor | None:
        """The packed mask, or None if scores tell what is kept."""
        return self.source if self.thresholds is None else None

    @property
    def scores(self) -> Tensor | None:
        """The scores, or None if source is a packed mask."""
        return None if self.thresholds is None else self.source

    @property
    def by_row(self) -> bool:
        """Whether each row of one matrix has a threshold of its own."""
        return self.thresholds is not None and self.thresholds.dim() == 1

    @property
    def threshold_stride(self) -> int:
        """Distance from one row's threshold to the next; 0 if all rows share one."""
        return self.thresholds.stride(0) if self.thresholds is not None and self.by_row else 0

    @property
    def tiled(self) -> tuple[Tensor, ...]:
        """The tensors that are read in tiles of the weight's shape: the scores. Packed words are read one by one."""
        return () if self.scores is None else (self.scores,)

    @property
    def magnitude(self) -> bool:
        """Whether scores are compared by their magnitude."""
        return self.mode == "magnitude"


@dataclass(frozen=True)
class KeepByTask:
    """Packed masks (N, ceil(K / 32)) of one matrix, and for each row of the tokens the index of its mask.

    Attributes: tasks: integers (rows,); -1 keeps all. Tokens are (rows, ..., features).
    """

    masks: Sequence[Tensor]
    tasks: Tensor


@dataclass(frozen=True)
class Experts:
    """The matrices of experts in one tensor (E, N, K), and where the rows of each expert end: int32 (E,)."""

    matrices: Tensor
    offsets: Tensor


Weight = Tensor | Codes | Experts


def as_rows(x: Tensor) -> Tensor:
    """Return tokens (..., K) as a matrix (rows, K), also for K = 0."""
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def contiguous(tensor: Tensor | None) -> Tensor | None:
    """Return the tensor, or a contiguous copy; None for None."""
    return None if tensor is None else tensor.contiguous()


def scores_and_signs(sign: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Return the source of d_scores' sign as (scores, words): at most one of them is not None."""
    return (None, sign) if sign is not None and sign.dtype == torch.int32 else (sign, None)


def dtypes_of(tokens: Tensor, weight: Weight, keep: Keep | KeepByTask | None) -> tuple:
    """Return the dtypes by which a backend is chosen: of the weight (of the tokens for codes), then of the scores."""
    matrix = weight.matrices if isinstance(weight, Experts) else weight
    first = matrix.dtype if isinstance(matrix, Tensor) else tokens.dtype
    scores = keep.scores if isinstance(keep, Keep) else None
    return (first,) if scores is None else (first, scores.dtype)


class Backward(NamedTuple):
    """The argument of a backend's ``gradients``, which differentiates product(x, weight, keep, bias, transposed=...).

    Attributes:
        sign: see Sums.
        score_dtype: the dtype of d_scores.
        output_mask: which of d_x, d_weight, d_scores and d_bias are wanted; the others are (0,).
    """

    grad_output: Tensor
    x: Tensor
    weight: Tensor | Experts
    keep: Keep
    sign: Tensor | None
    score_dtype: torch.dtype
    output_mask: Sequence[bool]
    transposed: bool = False


class Sums(NamedTuple):
    """The argument of a backend's ``score_grad``: sums over the tokens, grad_output.T @ x, and what to make from them.

    Attributes:
        grad_output: (..., N). x: (..., K).
        weight: (N, K), a factor of d_scores, or None.
        sign: another factor of d_scores: scores (N, K), whose sign is taken; the bits of their signs,
            int32 (N, ceil(K / 32)), 1 for +; or None.
        d_scores, d_weight: (N, K) contiguous, written in place; None if not wanted.
        accumulate: add to d_scores instead of replacing them.
        offsets: if given, all matrices are those of experts, (E, N, K), and d_scores[e] comes from the rows of expert
            e. Without rows it is 0, or unchanged if accumulate. d_weight must be None.
        keep: the mask for d_weight, which is 0 where a weight is dropped.
    """

    grad_output: Tensor
    x: Tensor
    weight: Tensor | None
    sign: Tensor | None
    d_scores: Tensor | None
    accumulate: bool = False
    offsets: Tensor | None = None
    d_weight: Tensor | None = None
    keep: Keep | None = None


def rates_of(
    step: Any, lr: Any, beta1: float, beta2: float, weight_decay: float, in_8_bits: bool
) -> tuple[Any, Any, Any]:
    """Return (decay, step_size, correction) of a step, or of many, by its number.

    decay is the factor by which weight decay multiplies the scores. step_size is the learning rate with the bias
    correction of the first moment. correction is that of the second moment's root: a factor for 8-bit moments, a
    divisor for exact ones.
    """
    return 1 - lr * weight_decay, lr / (1 - beta1**step), (1 - beta2**step) ** (-0.5 if in_8_bits else 0.5)


def clocks_of(steps: Tensor, lr: Tensor, *schedule: Any) -> Tensor:
    """Return what changes from step to step, for kernels to read from memory: int32 (len(steps), 4).

    A row is the step's number and the bits of decay, -step_size and correction in fp32. They are computed in double,
    like the numbers. schedule: see rates_of.
    """
    decay, step_size, correction = rates_of(steps.double(), lr.double(), *schedule)
    factors = torch.stack((decay.expand_as(steps), -step_size, correction), 1).float()
    return torch.cat((steps.to(torch.int32).view(-1, 1), factors.view(torch.int32)), 1)


@dataclass(frozen=True)
class Update:
    """One optimiser step on a matrix of scores, in place; see score_step for each field.

    grad and weight are (N, K) with any strides; scores and moments are contiguous.
    """

    scores: Tensor
    grad: Tensor
    weight: Tensor | None
    exp_avg: Tensor
    exp_avg_sq: Tensor
    scales: Tensor | None
    step: Any  # step and lr: numbers, or tensors () on the scores' device; step may also be a row of clocks_of
    lr: Any
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    grad_scale: Tensor | None
    seed: int
    mode: str
    keep_ratio: float | None
    threshold: Tensor | None

    @property
    def rates(self) -> tuple[Any, Any, Any]:
        """See rates_of."""
        return rates_of(self.step, self.lr, *self._schedule)

    @property
    def _schedule(self) -> tuple[float, float, float, bool]:
        return self.beta1, self.beta2, self.weight_decay, self.scales is not None

    def tensors(self) -> tuple[Tensor | None, ...]:
        """Return scores, gradient, weight, moments and scales, all contiguous."""
        weight = None if self.weight is None else self.weight.contiguous()
        return self.scores, self.grad.contiguous(), weight, self.exp_avg, self.exp_avg_sq, self.scales

    def on_host(self) -> "Update":
        """Return this update with numbers for step and lr. The host may wait for them."""
        if not isinstance(self.step, Tensor):
            return self
        return replace(self, step=int(self.step.view(-1)[0]), lr=float(self.lr))

    def by_clock(self) -> tuple["Update", Tensor | None]:
        """Return this update with numbers for step and lr, and the clock. With a clock, the numbers do not count.

        The clock, int32 (4,), is a row of clocks_of. It is None if step and lr are numbers already.
        """
        if not isinstance(self.step, Tensor):
            return self, None
        clock = self.step if self.step.dim() else clocks_of(self.step.view(1), self.lr, *self._schedule)[0]
        return replace(self, step=1, lr=0.0), clock

    @property
    def magnitude(self) -> bool:
        """Whether the next mask compares magnitudes."""
        return self.mode == "magnitude"
