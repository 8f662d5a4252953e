"""MaskedLayer: a frozen weight that learns which of its elements to keep. Parameters and state, no mathematics.

It is the base class of MaskedLinear and MaskedGroupedLinear.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ..mask.held import Weight
from ..mask.masking import CurrentMask, Rule, current_mask
from ..mask.scores import watch
from ..operands import PATTERNS
from ..ops.checks import (
    MODES,
    NonFiniteScores,
    check_alpha,
    check_fixed_threshold,
    check_floating,
    check_keep_ratio,
    check_mode,
    check_packed,
    check_pattern,
    check_scores_dtype,
    check_tensor,
)
from ..ops.select import unpack_mask
from ..reference.fixed_point import fixed_from_float, selectable

INITS = ("normal", "magnitude", "constant")
_SCALE = 0.02  # of the scores: the paper's standard deviation
_CONSTANT_NOISE = 0.01  # share of _SCALE: breaks ties, but drops few weights that the gradient wants


class MaskedLayer(nn.Module):
    """A module that computes with where(keep, weight, 0), and keeps the top ``keep_ratio`` of the weights by |scores|.

    weight is a matrix (N, K), or the matrices of experts (E, N, K), each of which keeps that ratio. Weight and bias are
    frozen. Scores of the weight's shape are trained. This is no complete layer: a subclass defines what is computed.
    """

    masks_weight = True  # see maskable.py
    pattern = "matrix"  # see MaskedLinear; it may be changed at any time
    _moving_threshold: Tensor | None = None  # what a compiled graph reads; see move_threshold
    in_features: int
    out_features: int
    weight: Any
    bias: Any
    scores: Any

    def _adopt(
        self, weight, bias, keep_ratio, mode, init, scores_dtype, threshold, generator, pattern="matrix"
    ) -> None:
        """Take over a weight and bias, freeze them, and initialise the scores."""
        check_mode(mode)
        check_fixed_threshold(threshold)
        check_pattern(pattern, keep_ratio, threshold, weight.shape)
        weight = weight.detach()
        if scores_dtype is None:
            scores_dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        check_scores_dtype(scores_dtype)
        self.keep_ratio = keep_ratio
        self.mode = mode
        self.threshold = threshold
        self.pattern = pattern
        self.module_name = ""  # its place in a model, for messages
        self._held: tuple[Tensor, Tensor | None, Weight | None] | None = None
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.scores = nn.Parameter(
            torch.empty_like(weight, dtype=scores_dtype, memory_format=torch.contiguous_format),
            requires_grad=scores_dtype.is_floating_point,
        )
        self.reset_scores(init, generator=generator)

    @property
    def keep_ratio(self) -> float:
        """Share of the weights that is kept, in [0, 1]. It may be changed at any time."""
        return self._keep_ratio

    @keep_ratio.setter
    def keep_ratio(self, value: float) -> None:
        check_keep_ratio(value)
        self._keep_ratio = value

    @property
    def threshold(self) -> float | None:
        """A fixed threshold in place of keep_ratio, or None. It may be changed at any time."""
        return self._threshold

    @threshold.setter
    def threshold(self, value: float | None) -> None:
        self._threshold, self._moving_threshold = value, None

    @property
    def rule(self) -> Rule:
        """How the layer selects its mask: current_mask(scores, *rule). Raises: ValueError if no such mask exists."""
        check_pattern(self.pattern, self._keep_ratio, self._threshold, self.scores.shape, self.module_name)
        return Rule(self._keep_ratio, self._threshold, self.mode, self.pattern)

    def move_threshold(self, value: float) -> None:
        """Set a threshold that changes often, for instance once per optimiser step.

        torch.compile makes a number part of its graph, so each new ``threshold`` compiles the model again. A threshold
        set here is an input of the graph. That graph does not check that scores are finite: the caller has to.
        """
        self.threshold = value
        if self.scores.is_floating_point():  # int16 scores have no gradient, so no graph trains them
            self._moving_threshold = self.scores.detach().new_full((), value)

    @torch.no_grad()
    def reset_scores(self, init: str = "magnitude", *, generator: torch.Generator | None = None) -> None:
        """Initialise the scores again; for ``init`` see MaskedLinear."""
        dtype = self.scores.dtype
        # 16-bit scores are drawn in fp32 and rounded, so that a seed gives one mask for every dtype of the scores.
        narrow = dtype.itemsize < 4
        scores = torch.empty_like(self.scores, dtype=torch.float32) if narrow else self.scores
        if init == "normal":
            scores.normal_(0, _SCALE, generator=generator)
        elif init == "magnitude":
            magnitude = self.weight.abs().to(scores.dtype)
            squares = magnitude.square()
            norm = (squares.mean() if squares.dim() == 2 else squares.mean((1, 2), keepdim=True)).sqrt()
            # A layer of zeros has no magnitudes to follow: its scores tie, and ties are kept.
            scores.copy_(magnitude.mul_(_SCALE / norm.clamp(min=torch.finfo(norm.dtype).tiny)))
            # Pruned, merged and 4-bit models have many weights of 0. Dropping one has no effect, and its score has no
            # gradient, so it would stay dropped for ever in place of another weight. So weights of 0 are kept.
            scores.masked_fill_(self.weight == 0, _SCALE)
        elif init == "constant":
            scores.normal_(_SCALE, _SCALE * _CONSTANT_NOISE, generator=generator)
        else:
            raise ValueError(f"init must be one of {INITS}, got {init!r}")
        # A score of exactly 0 gets no gradient (sign(0) = 0), so it would stay 0, and no bit can hold its sign. About
        # half of all layers with 4096 x 4096 normal fp32 scores have one.
        scores.masked_fill_(scores == 0, torch.finfo(scores.dtype).tiny)
        if narrow:
            self.scores.copy_(fixed_from_float(scores) if dtype == torch.int16 else scores)
        if dtype == torch.float16:  # fp32's tiny rounds to 0
            self.scores.masked_fill_(self.scores == 0, torch.finfo(dtype).tiny)

    def hold(self, packed: Tensor, grad_buffer: Tensor | None = None, *, weight: Weight | None = None) -> None:
        """Compute with this mask, and not with the scores, until release(). The scores may be elsewhere meanwhile.

        Args:
            packed: int32, (N, ceil(K / 32)) for a weight (N, K), on the weight's device; see pack_mask.
            grad_buffer: the weight's shape; the backward pass adds grad_output.T @ x to it. score_step makes the
                scores' gradient from it.
            weight: replaces self.weight: a tensor, a function that returns one, or a QuantizedMatrix.
        """
        shape = tuple(self.scores.shape)
        check_packed("packed", packed, shape)
        if grad_buffer is not None:
            check_tensor("grad_buffer", grad_buffer)
            check_floating("grad_buffer", grad_buffer)
            if grad_buffer.shape != shape or not grad_buffer.is_contiguous():
                raise ValueError(f"grad_buffer must be contiguous {shape}, got {tuple(grad_buffer.shape)}")
        self._held = packed, grad_buffer, weight

    def release(self) -> None:
        """Compute with the scores again."""
        self._held = None

    def current_mask(self) -> CurrentMask:
        """Select from the current scores again; return threshold, packed mask and packed signs."""
        try:
            return current_mask(self.scores, *self.rule, anew=True)
        except NonFiniteScores as error:
            raise self._name_error(error) from None

    def mask(self) -> Tensor:
        """Return the boolean mask, of the weight's shape: True where the weight is kept."""
        return unpack_mask(self.packed_mask(), self.scores.shape)

    def packed_mask(self) -> Tensor:
        """Return the mask as bits, int32 (N, ceil(K / 32)) for a weight (N, K); see pack_mask."""
        return self.current_mask().packed

    @torch.no_grad()
    def merged_weight(self, *, alpha: float = 1.0) -> Tensor:
        """Return a copy of the weight with the mask baked in: kept elements bit-equal, dropped ones +0.

        Args:
            alpha: how far to go from the weight to the masked one, in (0, 1]. Below 1, dropped elements are scaled by
                1 - alpha in fp32 (fp64 for an fp64 weight) and rounded once to the weight's dtype.
        """
        check_alpha(alpha)
        # torch multiplies a 16-bit tensor by a number in fp32.
        return torch.where(self.mask(), self.weight, 0 if alpha == 1 else self.weight * (1 - alpha))

    def extra_repr(self) -> str:
        kept = f"keep_ratio={self.keep_ratio}" if self.threshold is None else f"threshold={self.threshold}"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"{kept}, mode={self.mode!r}" + ("" if self.pattern == "matrix" else f", pattern={self.pattern!r}")
        )

    def _name_error(self, error: NonFiniteScores) -> NonFiniteScores:
        if not self.module_name:
            return error
        return NonFiniteScores(selectable(self.scores.detach()), self.module_name)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Register a parameter as nn.Module does, and watch ``scores`` for writes."""
        super().register_parameter(name, param)
        if name == "scores" and param is not None:
            watch(param)

    # The selection rule is saved with the scores, because another ratio would give another mask. It is saved as a
    # tensor, because safetensors takes nothing else.

    def get_extra_state(self) -> Tensor:
        """Return the rule as float64 (5,): keep_ratio, mode, whether a threshold is fixed, its value or 0, pattern.

        mode and pattern are places in MODES and PATTERNS.
        """
        fixed = self.threshold is not None
        values = (
            self.keep_ratio,
            MODES.index(self.mode),
            fixed,
            self.threshold if fixed else 0,
            PATTERNS.index(self.pattern),
        )
        return torch.tensor(values, dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        """Do nothing: loading compares the rules, and refuses one that differs."""

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        key = f"{prefix}_extra_state"
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if key not in state_dict:  # a state that was saved without the rule
            missing_keys[:] = [missing for missing in missing_keys if missing != key]
            return
        keep_ratio, mode, fixed, threshold, *pattern = state_dict[key].tolist()
        pattern = PATTERNS[int(pattern[0])] if pattern else "matrix"  # earlier states have four values
        saved = Rule(keep_ratio, threshold if fixed else None, MODES[int(mode)], pattern)
        if saved != self.rule:
            error_msgs.append(
                f"{prefix}scores must be loaded into a layer that selects as the saved one did, with "
                f"{_told(saved)}, got one with {_told(self.rule)}: set these to the saved ones first"
            )

    def __setstate__(self, state: dict) -> None:
        if "threshold" in state:  # a pickle with a plain attribute
            state = state | {"_threshold": state["threshold"]}
            del state["threshold"]
        super().__setstate__(state)
        watch(self.scores)  # a pickle holds an ordinary Parameter

    def _apply(self, fn, recurse=True):
        # .to(bfloat16), .half() and the like cast all parameters. The scores keep their dtype, or their small updates
        # would be lost to rounding.
        scores = self.scores

        def keep_scores_dtype(tensor: Tensor) -> Tensor:
            applied = fn(tensor)
            is_score = tensor is scores or tensor is scores.grad
            kept = tensor.to(applied.device) if is_score and applied.dtype != tensor.dtype else applied
            return kept.detach()  # torch may make a Parameter of it, which it cannot from Scores

        super()._apply(keep_scores_dtype, recurse)
        watch(self.scores)  # torch may have replaced it by a new Parameter
        if self._moving_threshold is not None:
            self._moving_threshold = self._moving_threshold.to(self.scores.device)
        return self


def _told(rule: Rule) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in rule._asdict().items())
