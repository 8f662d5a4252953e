"""What the masked products have in common: the mask from scores or from words, and its checks."""

from typing import Any

from ..operands import Keep
from .checks import check_device, check_mode, check_packed, check_scores, check_threshold


def keep_by_scores(call: Any) -> Keep:
    """Return the mask of a call with scores and a threshold."""
    threshold = call.threshold
    if call.scores.dim() == 3:
        threshold = threshold.expand(call.scores.shape[0]).contiguous()
    return Keep(call.scores, threshold, call.mode)


def keep_by_words(call: Any) -> Keep:
    """Return the mask of a call with packed words."""
    return Keep(call.packed)


def check_mask_of_scores(call: Any) -> Any:
    """Return the call with a threshold of the scores' dtype. Raises: unless mode, scores and threshold fit."""
    check_mode(call.mode)
    check_scores(call.scores, call.weight)
    check_threshold(call.threshold, call.scores)
    if call.threshold.dtype == call.scores.dtype:
        return call
    return call._replace(threshold=call.threshold.to(call.scores.dtype))


def check_mask_of_words(call: Any) -> Any:
    """Return the call. Raises: unless the words fit the weight."""
    check_packed("packed", call.packed, call.weight.shape)
    check_device("packed", call.packed, "weight", call.weight)
    return call
