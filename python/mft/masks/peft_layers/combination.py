"""Combine several masks on the same weights: keep what any mask keeps, what all masks keep, or what most masks keep."""

from collections.abc import Callable, Sequence
from functools import reduce

import torch
from torch import Tensor

from mft.checks import check_one_of, check_rule


def _vote(keeps: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Keep a weight if the masks that keep it hold at least half of the sum of ``weights``."""
    in_favour = torch.zeros(keeps[0].shape, dtype=torch.float64, device=keeps[0].device)
    for keep, weight in zip(keeps, weights):
        in_favour.add_(keep, alpha=weight)
    return in_favour >= sum(weights) / 2


# Each returns the mask, booleans of keeps' shape, of the weights that stay; weights: of check_combination.
COMBINATIONS: dict[str, Callable[[Sequence[Tensor], Sequence[float]], Tensor]] = {
    "union": lambda keeps, _: reduce(torch.logical_or, keeps),
    "intersection": lambda keeps, _: reduce(torch.logical_and, keeps),
    "vote": _vote,
}


def check_combination(how: str, weights: Sequence[float] | None, masks: int) -> list[float]:
    """Return the weights, by default 1 each. Raises ValueError if they do not fit this combination type."""
    check_one_of("combination_type", how, tuple(COMBINATIONS))
    found = [1.0] * masks if weights is None else [float(weight) for weight in weights]
    check_rule(len(found) == masks, "weights", f"have one number per adapter, {masks} of them", weights)
    check_rule(all(0 < weight < float("inf") for weight in found), "weights", "be positive and finite", weights)
    check_rule(
        how == "vote" or len(set(found)) == 1, "weights", f"be equal for {how}, where they have no effect", weights
    )
    return found
