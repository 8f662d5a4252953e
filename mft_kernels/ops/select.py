"""From scores to thresholds, packed masks and packed signs."""

import torch
from torch import Tensor

from .. import reference
from ..backends.table import choose
from ..operands import Experts
from ..reference.fixed_point import selectable
from .checks import (
    NonFiniteScores,
    check_floating,
    check_keep_ratio,
    check_mode,
    check_packed,
    check_tensor,
    check_threshold,
    check_whole,
)
from .route import Op


def kept_threshold(scores: Tensor, keep_ratio: float, *, mode: str = "magnitude", backend: str = "auto") -> Tensor:
    """The k-th largest |scores| (scores in mode "value"), k = numel - int((1 - keep_ratio) * numel).

    Exact, without a sort where a kernel serves it, and without a host synchronisation.

    Args:
        scores: any shape, floating or int16 (see fixed_point.py).
    Returns: () in the scores' dtype; +inf if k is 0; NaN if a score on an accelerator is not finite (of int16 scores,
        the codes that read so as fp16).
    Raises: ValueError if keep_ratio is outside [0, 1], or if scores on the CPU are not all finite.
    """
    check_whole("scores", scores)
    check_mode(mode)
    check_keep_ratio(keep_ratio)
    check_tensor("scores", scores)
    keys = selectable(scores.detach())
    check_floating("scores", keys)
    return _KEPT_THRESHOLD(keys, keep_ratio, mode, backend).view(scores.dtype)


def kept_thresholds(scores: Tensor, keep_ratio: float, *, mode: str = "magnitude", backend: str = "auto") -> Tensor:
    """kept_threshold of each expert: of scores (E, ...) the thresholds (E,), in the scores' dtype.

    Raises: ValueError if keep_ratio is outside [0, 1], or if scores on the CPU are not all finite; on an accelerator
        the thresholds of experts whose scores are not are NaN.
    """
    check_whole("scores", scores)
    check_mode(mode)
    check_keep_ratio(keep_ratio)
    check_tensor("scores", scores)
    if scores.dim() < 2 or scores.shape[0] == 0:
        raise ValueError(f"scores must be (experts, ...), at least one, got shape {tuple(scores.shape)}")
    keys = selectable(scores.detach())
    check_floating("scores", keys)
    return _KEPT_THRESHOLDS(keys, keep_ratio, mode, backend).view(scores.dtype)


def pack_mask(scores: Tensor, threshold: Tensor, *, mode: str = "magnitude", backend: str = "auto") -> Tensor:
    """The mask as bits: bit j % 32 of word j // 32 of row n tells whether weight (n, j) is kept.

    Args: scores (N, K), floating or int16 (see fixed_point.py); threshold () or (N,), for int16 scores a code too. Of
        experts scores are (E, N, K), and threshold () or (E,).
    Returns: int32 (N, ceil(K / 32)), of experts (E, N, ceil(K / 32)); padding bits are 0.
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
        raise ValueError(f"scores must be (N, K), or of experts (E, N, K), got shape {tuple(scores.shape)}")
    check_threshold(threshold, keys)
    threshold = threshold.to(keys.dtype)
    if keys.dim() == 2:
        return _PACK_MASK(keys, threshold, mode, backend)
    if threshold.dim() == 1:
        threshold = threshold.repeat_interleave(keys.shape[1])  # one a row
    packed = _PACK_MASK(keys.flatten(0, 1), threshold, mode, backend)
    return packed.unflatten(0, keys.shape[:2])


def unpack_mask(packed: Tensor, shape: tuple[int, ...] | torch.Size) -> Tensor:
    """The boolean mask of ``shape`` (N, K) or (E, N, K) that pack_mask packed."""
    if len(shape) not in (2, 3):
        raise ValueError(f"shape must be (N, K), or of experts (E, N, K), got {tuple(shape)}")
    check_packed("packed", packed, shape)
    return _UNPACK_MASK(packed, list(shape))


def pack_signs(scores: Tensor) -> tuple[Tensor, Tensor]:
    """(scores > 0 as bits like pack_mask, how many scores are exactly 0: those have no sign), unchecked."""
    return _PACK_SIGNS(scores, "auto")


def select_each(scores: Tensor, keep_ratio: float, mode: str) -> tuple[Tensor, Tensor]:
    """(thresholds (E,), packed mask) of scores (E, N, K), floating or int16, as score_step finds them of a matrix.

    An expert whose scores are not finite has the threshold NaN (0x7e00 for int16) and keeps nothing, on a CPU too.
    """
    with torch.no_grad():
        return _SELECT_EACH(scores, keep_ratio, mode)


# ---------------------------------------------------------------------------------------------- their definition


def _finite(threshold: Tensor, scores: Tensor) -> Tensor:
    # Inside the op, so that compiled code and vmap meet it too. An accelerator would have to be waited for.
    if scores.device.type == "cpu" and threshold.isnan().any():
        raise NonFiniteScores(scores)
    return threshold


def _kept_threshold(scores, keep_ratio, mode, backend):
    run = choose("select", scores.device, (scores.dtype,), backend, op="kept_threshold")
    return _finite(run(scores, keep_ratio, mode), scores)


def _thresholds(scores, keep_ratio, mode, backend):
    operands = frozenset({Experts})
    run = choose("select", scores.device, (scores.dtype,), backend, op="kept_thresholds", operands=operands)
    return run(scores, keep_ratio, mode, each=True)


def _pack(scores, threshold, mode, backend):
    return choose("pack", scores.device, (scores.dtype,), backend, op="pack_mask")(scores, threshold, mode)


def _signs(scores, backend):
    return choose("signs", scores.device, (scores.dtype,), backend, op="pack_signs")(scores)


def _select_each(scores, keep_ratio, mode):
    keys = selectable(scores)
    found = _thresholds(keys, keep_ratio, mode, "auto")
    packed = _pack(keys.flatten(0, 1), found.repeat_interleave(keys.shape[1]), mode, "auto")
    return found.view(scores.dtype), packed.unflatten(0, keys.shape[:2])


_KEPT_THRESHOLD = Op("kept_threshold", lambda call: _kept_threshold(*call))
_KEPT_THRESHOLDS = Op("kept_thresholds", lambda call: _finite(_thresholds(*call), call.scores))
_PACK_MASK = Op("pack_mask", lambda call: _pack(*call))
_PACK_SIGNS = Op("pack_signs", lambda call: _signs(*call))
_UNPACK_MASK = Op("unpack_mask", lambda call: reference.unpack_mask(*call).contiguous())
_SELECT_EACH = Op("select_each", lambda call: _select_each(*call))
