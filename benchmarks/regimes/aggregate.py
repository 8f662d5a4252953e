"""Aggregate clients' messages on a server: masks into probabilities, signs into a majority, updates into a mean.

These are pure functions on arrays, one matrix at a time. They need no framework. In a Flower strategy, call them in
aggregate_fit, between parameters_to_ndarrays and ndarrays_to_parameters.

Each client c votes with a mask m_c or an update u_c. A client's weight w_c, such as its number of examples, is 1 unless
given.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mft.checks import check_rule

Floats = NDArray[np.float64]
Bits = NDArray[np.bool_]


def keep_probabilities(
    masks: Sequence[ArrayLike],
    weights: Sequence[float] | None = None,
    *,
    before: ArrayLike | None = None,
    strength: float = 0.0,
) -> Floats:
    """Compute the probability that a weight is kept: p = (sum_c w_c m_c + strength * before) / (sum_c w_c + strength).

    This is the mean of a Beta posterior, as FedPM aggregates stochastic masks (arXiv 2209.15328). before is the
    probability at the start of the round, and counts as many votes as strength says. With strength 0, before has no
    effect.

    Args:
        masks: One mask per client, all of one shape; True where a weight is kept.
        weights: One weight w_c per client.
        before: The same shape as a mask, in [0, 1]; needed if strength is above 0.
    Raises: ValueError if there is no mask, or shapes or numbers do not fit.
    """
    votes, shares = _stacked(masks, "masks"), _shares(weights, len(masks))
    check_rule(strength >= 0, "strength", "be at least 0", strength)
    check_rule(before is not None or strength == 0, "before", f"be given with strength {strength:g}", before)
    kept = np.tensordot(shares, votes.astype(np.float64), 1)
    if before is not None:
        prior = np.asarray(before, np.float64)
        check_rule(prior.shape == kept.shape, "before", f"have the shape of the masks {kept.shape}", prior.shape)
        check_rule(bool(((prior >= 0) & (prior <= 1)).all()), "before", "lie in [0, 1]", "others")
        kept += strength * prior
    return kept / (shares.sum() + strength)


def majority_mask(probabilities: ArrayLike) -> Bits:
    """Return True where at least half of the votes keep a weight. On a tie, the weight is kept."""
    return np.asarray(probabilities) >= 0.5


def sample_mask(probabilities: ArrayLike, generator: np.random.Generator) -> Bits:
    """Draw a stochastic mask, as FedPM's clients do: each weight is kept with its probability."""
    chances = np.asarray(probabilities)
    return generator.random(chances.shape) < chances


def majority_sign(updates: Sequence[ArrayLike], weights: Sequence[float] | None = None) -> Floats:
    """Compute sign(sum_c w_c sign(u_c)), 0 where votes are even: signSGD with majority vote (arXiv 1810.05291)."""
    return np.sign(np.tensordot(_shares(weights, len(updates)), np.sign(_stacked(updates, "updates")), 1))


def weighted_mean(updates: Sequence[ArrayLike], weights: Sequence[float] | None = None) -> Floats:
    """Compute sum_c w_c u_c / sum_c w_c: FedAvg of updates, or of what decode_signs returns."""
    shares = _shares(weights, len(updates))
    return np.tensordot(shares, _stacked(updates, "updates").astype(np.float64), 1) / shares.sum()


# ---------------------------------------------------------------------------------------------- private


def _stacked(votes: Sequence[ArrayLike], name: str) -> NDArray:
    check_rule(len(votes) > 0, name, "hold the array of at least one client", votes)
    arrays = [np.asarray(vote) for vote in votes]
    shapes = {array.shape for array in arrays}
    check_rule(len(shapes) == 1, name, "have one shape", ", ".join(map(str, sorted(shapes))))
    return np.stack(arrays)


def _shares(weights: Sequence[float] | None, clients: int) -> Floats:
    if weights is None:
        return np.ones(clients)
    shares = np.asarray(weights, np.float64)
    check_rule(shares.shape == (clients,), "weights", f"hold a number for each of {clients} clients", shares.shape)
    positive = bool((shares >= 0).all() and np.isfinite(shares).all() and shares.sum() > 0)
    check_rule(positive, "weights", "be finite, at least 0, and not all 0", weights)
    return shares
