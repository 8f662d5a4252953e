"""The smallest difference that a study can show, from its seeds and test documents, before anything runs.

A mean difference over S seeds and D documents has the squared standard errors V_S = sd_S^2 / S over seeds and
V_D = sd_D^2 / D over documents. At level alpha = 0.05 it is found with probability 0.8 if it is at least

    (t_v(1 - alpha / 2) + t_v(0.8)) sqrt(V_S + V_D),    v = (V_S + V_D)^2 / (V_S^2 / (S - 1) + V_D^2 / (D - 1))

where t_v are quantiles of Student's t, with v by Satterthwaite. statistics.py uses the same v, so few seeds widen this
difference as they widen intervals there. With infinitely many seeds the two quantiles add up to 2.8.
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mft_study.config import CROSS_ENTROPY, StudyConfig
from mft_study.evidence.sums import FILE, Sums, read_sums

ALPHA, POWER = 0.05, 0.8
LEAST_DOCUMENTS = 20
# One seed says nothing about how seeds differ. In a simulation without any difference, with 50 documents and the spread
# of studies on headers (SD 0.0038 over seeds, 0.018 over documents, nats per token), a p below 0.05 occurs with a
# probability of 0.24 for one seed and 0.07 for two.
LEAST_SEEDS = 2
_DRAWS = 200_000  # of Student's t, which give its quantiles to about 1 %
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Spread:
    """How much a difference of two arms varies: standard deviations in nats per token, and where they come from."""

    seeds: float
    documents: float
    source: str


# From the stored studies: differences of tuned arms on test. If two values are known, this is the larger.
SMALL_HEADERS = Spread(0.0038, 0.018, "a model of 1 M parameters on C++ headers")
SMOLLM2_CODE = Spread(0.002, 0.031, "SmolLM2-135M on library source")
UNKNOWN = Spread(0.0038, 0.031, "the larger of the stored studies: no earlier result has this model and text")


def smallest_difference(spread: Spread, seeds: int, documents: int) -> float:
    """Return the difference in nats per token that a share POWER of such studies show; else infinity."""
    if seeds < 2 or documents < 2:
        return math.inf
    over_seeds, over_documents = spread.seeds**2 / seeds, spread.documents**2 / documents
    freedom = degrees_of_freedom(np.array(over_seeds), np.array(over_documents), seeds, documents)
    drawn = np.random.default_rng(0).standard_t(freedom, _DRAWS)
    return float(np.quantile(drawn, (1 - ALPHA / 2, POWER)).sum() * math.sqrt(over_seeds + over_documents))


def lacking(documents: int, seeds: int) -> str:
    """Return which test documents and seeds are missing for any conclusion; "" if none are."""
    lacks = []
    if documents < LEAST_DOCUMENTS:
        lacks.append(f"{documents} test document{'s' * (documents != 1)}, at least {LEAST_DOCUMENTS} are needed")
    if seeds < LEAST_SEEDS:
        lacks.append(f"a single seed, at least {LEAST_SEEDS} are needed, better 3")
    return "; ".join(lacks)


def shortage_lines(study: StudyConfig, documents: Mapping[str, int]) -> list[str]:
    """Return a line per domain that allows no conclusion. documents: the number of test documents by domain."""
    short = {domain: lacking(count, len(study.all_seeds)) for domain, count in documents.items()}
    return [
        f"Nothing will be concluded on {domain}: {lacks}. Stop now (Ctrl-C) and give more: about a tenth of the data "
        "becomes test"
        for domain, lacks in short.items()
        if lacks
    ]


def power_lines(study: StudyConfig, documents: Mapping[str, int], directory: Path) -> list[str]:
    """Return a line per domain that allows a conclusion. documents: the number of test documents by domain."""
    if study.objective != CROSS_ENTROPY:  # nothing is known of how wrong answers vary
        return []
    earlier, seeds, lines = directory / FILE, len(study.all_seeds), []
    sums = read_sums(earlier) if earlier.is_file() else None
    for domain, count in documents.items():
        if lacking(count, seeds):
            continue
        measured = None if sums is None else spread_in(sums, domain, [n for n, arm in study.arms.items() if arm.tuned])
        words = power_words(measured or _known(study, domain), seeds, count)
        lines.append(f"{domain}: {words}. Half of it needs four times as many of both")
    return lines


def power_words(spread: Spread, seeds: int, documents: int) -> str:
    """Return the smallest difference that can be shown, in words."""
    least = smallest_difference(spread, seeds, documents)
    return (
        f"{seeds} seeds and {documents} test documents can show a difference of {least:.4f} nats per token "
        f"(p < {ALPHA}, power {POWER}, one comparison; more comparisons need more), if differences vary by "
        f"{spread.seeds:.4f} over seeds and {spread.documents:.4f} over documents, as for {spread.source}"
    )


def spread_in(sums: Sums, domain: str, arms: Iterable[str]) -> Spread | None:
    """Return the median spread over all pairs of these arms on test; None if no pair has 2 seeds and 2 documents."""
    spreads = list(_spreads(sums, domain, list(arms)))
    if not spreads:
        return None
    seeds, documents = np.median(spreads, axis=0)
    return Spread(float(seeds), float(documents), f"the {len(spreads)} pairs of tuned arms in its earlier {FILE}")


def deviations(sums: Floats, counts: Floats) -> tuple[float, float]:
    """Return the standard deviations over seeds and over documents of a difference: sums (S, D), counts (D,)."""
    by_seed = sums.sum(-1) / counts.sum()
    residuals = (sums - by_seed[:, None] * counts).mean(0)
    errors = squared_errors((by_seed - by_seed.mean())[None], residuals[None], counts[None])
    over_seeds, over_documents = (error.item() * count for error, count in zip(errors, sums.shape))
    return math.sqrt(over_seeds), math.sqrt(over_documents)


def squared_errors(from_mean: Floats, residuals: Floats, counts: Floats) -> tuple[Floats, Floats]:
    """Return (V_S, V_D), each of shape (C,), for C mean differences.

    from_mean: (C, S), the mean with each seed minus the mean over all seeds. residuals: (C, D), a document's sum minus
    the mean times its count (counts, (C, D), tokens), averaged over seeds.
    """
    seeds, documents = from_mean.shape[-1], residuals.shape[-1]
    over_seeds = (from_mean**2).sum(-1) / (seeds * max(1, seeds - 1))
    over_documents = (residuals**2).sum(-1) * documents / ((documents - 1) * counts.sum(-1) ** 2)
    return over_seeds, over_documents


def degrees_of_freedom(over_seeds: Floats, over_documents: Floats, seeds: int, documents: int) -> Floats:
    """Return v of the formula above, for V_S and V_D of the same shape."""
    total = over_seeds + over_documents
    share = np.divide(over_seeds, total, out=np.zeros_like(total), where=total > 0)
    return 1 / (share**2 / max(1, seeds - 1) + (1 - share) ** 2 / (documents - 1))


# ---------------------------------------------------------------------------------------------- private


def _known(study: StudyConfig, domain: str) -> Spread:
    """Return the spread in the stored studies for the same kind of model and text."""
    sources = study.domains[domain].every_source
    if study.scratch is not None and sources == ["headers"]:
        return SMALL_HEADERS
    if study.scratch is None and study.model.name == "smollm2-135m" and sources == ["stdlib"]:
        return SMOLLM2_CODE
    return UNKNOWN


def _spreads(sums: Sums, domain: str, arms: list[str]) -> Iterator[tuple[float, float]]:
    """Yield the deviations for each pair of arms."""
    measured = set(sums.arms(domain))
    for one, other in itertools.combinations([arm for arm in arms if arm in measured], 2):
        a, b = sums.runs(domain, one), sums.runs(domain, other)
        seeds, n = sorted(a.keys() & b.keys()), next(iter(a.values())).evaluation.tokens.numpy()
        if len(seeds) < 2 or len(n) < 2:
            continue
        x = np.stack([(a[seed].evaluation.loss_sums - b[seed].evaluation.loss_sums).numpy() for seed in seeds])
        yield deviations(x, n)
