"""Compute thresholds, packed masks and packed signs from scores."""

from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..backends.selection import Selection
from ..backends.table import choose
from ..operands import Experts
from ..reference.fixed_point import code_at_least, selectable
from .checks import (
    NonFiniteScores,
    check_floating,
    check_keep_ratio,
    check_mode,
    check_packed,
    check_shape,
    check_tensor,
    check_threshold,
    check_whole,
)
from .route import Op


def kept_threshold(scores: Tensor, keep_ratio: float, *, mode: str = "magnitude", backend: str = "auto") -> Tensor:
    """Return the k-th largest |scores| (scores in mode "value"), k = numel - int((1 - keep_ratio) * numel).

    The result is exact and needs no host synchronisation. Kernels find it without a sort.

    Args:
        scores: any shape, floating or int16 (see fixed_point.py).
    Returns: () in the scores' dtype: +inf if k is 0, NaN if a score on an accelerator is not finite. For int16 scores
        these are the codes that are +inf and NaN when read as fp16.
    Raises: ValueError if keep_ratio is outside [0, 1], or if scores on the CPU are not all finite.
    """
    return _KEPT_THRESHOLD(_keys(scores, keep_ratio, mode), keep_ratio, mode, backend).view(scores.dtype)


def kept_thresholds(scores: Tensor, keep_ratio: float, *, mode: str = "magnitude", backend: str = "auto") -> Tensor:
    """Return kept_threshold of each expert, (E,) for scores (E, ...), in the scores' dtype.

    Raises: ValueError if keep_ratio is outside [0, 1], or if scores on the CPU are not all finite. On an accelerator
        an expert whose scores are not all finite gets the threshold NaN instead.
    """
    keys = _keys(scores, keep_ratio, mode)
    if scores.dim() < 2 or scores.shape[0] == 0:
        raise ValueError(f"scores must be (experts, ...), at least one, got shape {tuple(scores.shape)}")
    return _KEPT_THRESHOLDS(keys, keep_ratio, mode, backend).view(scores.dtype)


def pack_mask(scores: Tensor, threshold: Tensor, *, mode: str = "magnitude", backend: str = "auto") -> Tensor:
    """Pack the mask into bits: bit j % 32 of word j // 32 of row n tells whether weight (n, j) is kept.

    Args:
        scores: (N, K), or (E, N, K) for experts; floating or int16 (see fixed_point.py).
        threshold: () or (N,), or () or (E,) for experts; an int16 code if scores are int16.
    Returns: int32 (N, ceil(K / 32)), or (E, N, ceil(K / 32)) for experts. Padding bits are 0.
    """
    check_whole("scores", scores)
    check_mode(mode)
    check_tensor("scores", scores)
    check_tensor("threshold", threshold)
    if scores.dtype == torch.int16 and threshold.dtype != torch.int16:
        raise TypeError(
            f"threshold must be an int16 code as the scores are, got {threshold.dtype}; see kept_threshold and "
            "fixed_from_float"
        )
    keys, threshold = selectable(scores.detach()), selectable(threshold)
    check_floating("scores", keys)
    if keys.dim() not in (2, 3):
        raise ValueError(f"scores must be (N, K), or (E, N, K) for experts, got shape {tuple(scores.shape)}")
    check_threshold(threshold, keys)
    threshold = threshold.to(keys.dtype)
    if keys.dim() == 2:
        return _PACK_MASK(keys, threshold, mode, backend)
    if threshold.dim() == 1:
        threshold = threshold.repeat_interleave(keys.shape[1])  # one per row
    packed = _PACK_MASK(keys.flatten(0, 1), threshold, mode, backend)
    return packed.unflatten(0, keys.shape[:2])


def unpack_mask(packed: Tensor, shape: tuple[int, ...] | torch.Size) -> Tensor:
    """Return the boolean mask of ``shape``, (N, K) or (E, N, K), that pack_mask packed."""
    check_shape(shape, experts=True)
    check_packed("packed", packed, shape)
    return _UNPACK_MASK(packed, list(shape))


def pack_signs(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Return scores > 0 as bits, in the layout of pack_mask, and the number of scores that are exactly 0.

    A score of 0 has no sign. The argument is not checked.
    """
    return _PACK_SIGNS(scores, "auto")


def select_mask(
    scores: Tensor,
    keep_ratio: float,
    threshold: float | None,
    mode: str,
    pattern: str = "matrix",
    *,
    with_signs: bool = True,
    backend: str = "auto",
) -> Selection:
    """Select a whole mask: the results of kept_threshold, pack_mask and pack_signs, by one op.

    Arguments are not checked. Scores that are not finite do not raise, also on a CPU: a threshold that is found is then
    NaN (0x7e00 for int16), and a matrix with that threshold keeps nothing.

    Args:
        scores: (N, K), or (E, N, K) for experts; floating or int16 (see fixed_point.py).
        threshold: a fixed one, or None to find the one that keeps ``keep_ratio`` of each matrix.
        pattern: "matrix", or another of PATTERNS for scores (N, K) without a fixed threshold; see
            reference.pattern_mask. No threshold tells what is kept then: it is 0.
        with_signs: whether signs are needed. int16 scores have none.
    Returns: threshold, () or (E,), in the scores' dtype; packed mask and packed signs, int32 (..., ceil(K / 32)); the
        number of scores that are exactly 0. Without signs these are empty, and the number is 0.
    """
    if pattern != "matrix":
        return _select_pattern(scores.detach(), keep_ratio, mode, pattern, with_signs, backend)
    return _SELECT_MASK(scores.detach(), keep_ratio, threshold, mode, with_signs, backend)


# ---------------------------------------------------------------------------------------------- the ops' definitions


def _keys(scores: Tensor, keep_ratio: float, mode: str) -> Tensor:
    """Return floating scores to select from. Raises: see kept_threshold."""
    check_whole("scores", scores)
    check_mode(mode)
    check_keep_ratio(keep_ratio)
    check_tensor("scores", scores)
    keys = selectable(scores.detach())
    check_floating("scores", keys)
    return keys


def _threshold(call: Any, operands: frozenset[type] = frozenset(), **each: bool) -> Tensor:
    scores = call.scores
    run = choose("select", scores.device, (scores.dtype,), call.backend, op=type(call).__name__, operands=operands)
    threshold = run(scores, call.keep_ratio, call.mode, **each)
    # Inside the op, so that compiled code and vmap run it too. On an accelerator it would wait for the device.
    if scores.device.type == "cpu" and threshold.isnan().any():
        raise NonFiniteScores(scores)
    return threshold


def _pack(scores, threshold, mode, backend):
    return choose("pack", scores.device, (scores.dtype,), backend, op="pack_mask")(scores, threshold, mode)


def _signs(scores, backend):
    return choose("signs", scores.device, (scores.dtype,), backend, op="pack_signs")(scores)


def _select_mask(scores, keep_ratio, fixed, mode, with_signs, backend):
    keys = selectable(scores)
    threshold = None
    if fixed is not None:
        # Filled on the device: a copy from the host cannot be captured.
        threshold = selectable(scores.new_full((), code_at_least(fixed) if scores.dtype == torch.int16 else fixed))
    operands = frozenset({Experts}) if scores.dim() == 3 else frozenset()
    run = choose("select_mask", scores.device, (keys.dtype,), backend, operands=operands)
    found, *rest = run(keys, keep_ratio, threshold, mode, with_signs)
    return found.view(scores.dtype), *rest


def _select_pattern(scores, keep_ratio, mode, pattern, with_signs, backend):
    keys = selectable(scores)
    finite = keys.isfinite().all()
    kept = reference.pattern_mask(keys, keep_ratio, mode, pattern) & finite
    packed = _PACK_MASK(kept.to(keys.dtype), keys.new_ones(()), "value", backend)
    found = torch.where(finite, keys.new_zeros(()), torch.nan).view(scores.dtype)
    if not with_signs:
        return found, packed, packed.new_empty(0), packed.new_zeros((), dtype=torch.int64)
    return found, packed, *_PACK_SIGNS(keys, backend)


_KEPT_THRESHOLD = Op("kept_threshold", _threshold)
_KEPT_THRESHOLDS = Op("kept_thresholds", lambda call: _threshold(call, frozenset({Experts}), each=True))
_PACK_MASK = Op("pack_mask", lambda call: _pack(*call))
_PACK_SIGNS = Op("pack_signs", lambda call: _signs(*call))
_UNPACK_MASK = Op("unpack_mask", lambda call: reference.unpack_mask(*call).contiguous())
_SELECT_MASK = Op("select_mask", lambda call: _select_mask(*call))
