"""Aggregate clients' messages on a server: masks into probabilities, signs into a majority, updates into a mean.

These are pure functions on arrays, one matrix at a time. They need no framework. In a Flower strategy, call them in
aggregate_fit, between parameters_to_ndarrays and ndarrays_to_parameters.

Each client c votes with a mask m_c or an update u_c, and all votes count alike.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mft.checks import check_rule

Floats = NDArray[np.float64]
Bits = NDArray[np.bool_]


def keep_probabilities(masks: Sequence[ArrayLike], *, before: ArrayLike | None = None, strength: float = 0.0) -> Floats:
    """Compute the probability that a weight is kept: p = (sum_c m_c + strength * before) / (clients + strength).

    This is the mean of a Beta posterior, as FedPM aggregates stochastic masks (arXiv 2209.15328). before is the
    probability at the start of the round, and counts as many votes as strength says. With strength 0, before has no
    effect.

    Args:
        masks: One mask per client, all of one shape; True where a weight is kept.
        before: The same shape as a mask, in [0, 1]; needed if strength is above 0.
    Raises: ValueError if there is no mask, or shapes or numbers do not fit.
    """
    kept = _stacked(masks, "masks").sum(0, dtype=np.float64)
    check_rule(strength >= 0, "strength", "be at least 0", strength)
    check_rule(before is not None or strength == 0, "before", f"be given with strength {strength:g}", before)
    if before is not None:
        prior = np.asarray(before, np.float64)
        check_rule(prior.shape == kept.shape, "before", f"have the shape of the masks {kept.shape}", prior.shape)
        check_rule(bool(((prior >= 0) & (prior <= 1)).all()), "before", "lie in [0, 1]", "others")
        kept += strength * prior
    return kept / (len(masks) + strength)


def majority_mask(probabilities: ArrayLike) -> Bits:
    """Return True where at least half of the votes keep a weight. On a tie, the weight is kept."""
    return np.asarray(probabilities) >= 0.5


def sample_mask(probabilities: ArrayLike, generator: np.random.Generator) -> Bits:
    """Draw a stochastic mask, as FedPM's clients do: each weight is kept with its probability."""
    chances = np.asarray(probabilities)
    return generator.random(chances.shape) < chances


def majority_sign(updates: Sequence[ArrayLike]) -> Floats:
    """Compute sign(sum_c sign(u_c)), 0 where votes are even: signSGD with majority vote (arXiv 1810.05291)."""
    return np.sign(np.sign(_stacked(updates, "updates")).sum(0))


def mean_update(updates: Sequence[ArrayLike]) -> Floats:
    """Compute the mean of u_c in fp64: FedAvg of updates, or of what decode_signs returns."""
    return _stacked(updates, "updates").mean(0, dtype=np.float64)


def _stacked(votes: Sequence[ArrayLike], name: str) -> NDArray:
    check_rule(len(votes) > 0, name, "hold the array of at least one client", votes)
    arrays = [np.asarray(vote) for vote in votes]
    shapes = {array.shape for array in arrays}
    check_rule(len(shapes) == 1, name, "have one shape", ", ".join(map(str, sorted(shapes))))
    return np.stack(arrays)
