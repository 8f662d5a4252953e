"""Differences of two arms, paired by seed and document, with intervals that account for both.

Notation: S seeds; D documents; x[s, d], the difference of two arms' sums over a document; n[d], the number of tokens or
questions in it; t_s = sum_d x[s, d] / sum_d n[d]. The estimate is the mean of t_s over seeds.
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mft_study.config import REWARDS, StudyConfig
from mft_study.evidence.power import degrees_of_freedom, squared_errors
from mft_study.evidence.sums import NATS_DECIMALS
from mft_study.outcome import General, Measured

METRICS = ("loss", "tempered", "accuracy", "answers")
WRONG = "wrong"  # questions minus exact answers: what training by rewards minimises
CONFIDENCE = 0.95
LEVEL = 1 - CONFIDENCE
DRAWS = 10_000
_MANY_SEEDS = 5
_CHUNK_BYTES = 32 << 20  # of multiplicities at once; with their counts and products well below 200 MB
_DRAWN_BYTES = 128 << 20  # of draws at once, over several differences
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Paired:
    """Two arms paired. sums: (S, D), arm a's minus arm b's. counts: (D,), all positive."""

    sums: Floats
    counts: Floats

    @property
    def estimate(self) -> float:
        return float((self.sums.sum(-1) / self.counts.sum()).mean())


@dataclass(frozen=True)
class Difference:
    """A mean difference per token (or per question), its 95 % interval and two-sided p; both NaN for one document."""

    estimate: float
    low: float
    high: float
    p: float
    seeds: int
    documents: int
    p_holm: float | None = None


def paired(
    a: Mapping[int, Measured | General], b: Mapping[int, Measured | General], metric: str = "loss"
) -> Paired | None:
    """Return a - b for the seeds that both have; None if there is no such seed, or one of them lacks the metric.

    a, b: runs by seed, on one split and text. metric: loss (nats), tempered (nats at the arm's own temperature),
    accuracy (tokens whose likeliest prediction is right), answers (questions answered exactly) or wrong (the others).
    Raises: ValueError for an unknown metric, or if the documents differ between a and b or between seeds.
    """
    if metric not in (*METRICS, WRONG):
        raise ValueError(f"metric must be one of {(*METRICS, WRONG)}, got {metric!r}")
    seeds = sorted(a.keys() & b.keys())
    measured = [_sums(arm[seed], metric) for arm in (a, b) for seed in seeds]
    known = [one for one in measured if one is not None]
    if not known or len(known) < len(measured):
        return None
    documents, _, counts = known[0]
    for others, _, other_counts in known:
        if not np.array_equal(others, documents) or not np.array_equal(other_counts, counts):
            raise ValueError(
                "a and b must be measured on the same documents in every seed to be paired, got "
                f"{len(documents)} documents that count {counts.sum():g}, and {len(others)} that count "
                f"{other_counts.sum():g}"
            )
    of_a, of_b = np.stack([sums for _, sums, _ in known]).reshape(2, len(seeds), -1)
    sums = of_a - of_b
    return Paired(sums[:, counts > 0], counts[counts > 0])


def mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)


def deciding_metric(study: StudyConfig) -> str:
    """Return the metric that verdicts are about, lower is better: the loss, or wrong answers if trained by rewards."""
    return WRONG if study.objective == REWARDS else "loss"


def differences(pairs: Sequence[Paired], *, draws: int = DRAWS) -> list[Difference]:
    """Return the estimate, percentile interval and p of each pair; each gets the draws that it would get alone.

    p = 2 (1 + min(number of draws <= 0, number of draws >= 0)) / (1 + draws), at most 1.
    """
    found: list[Difference | None] = [None] * len(pairs)
    groups: dict[tuple[int, ...], list[int]] = {}
    for place, pair in enumerate(pairs):
        groups.setdefault(pair.sums.shape, []).append(place)
    for (seeds, documents), places in _split_groups(groups, max(1, _DRAWN_BYTES // (8 * draws))):
        sums, counts = (np.stack([getattr(pairs[place], name) for place in places]) for name in ("sums", "counts"))
        estimates = (sums.sum(-1) / counts.sum(-1)[:, None]).mean(-1)
        if documents < 2:
            for place, estimate in zip(places, estimates):
                found[place] = Difference(float(estimate), math.nan, math.nan, math.nan, seeds, documents)
            continue
        drawn = resampled(sums, counts, draws)
        tail = (1 - CONFIDENCE) / 2
        lows, highs = np.quantile(drawn, (tail, 1 - tail), axis=-1)
        fewer = np.minimum((drawn <= 0).sum(-1), (drawn >= 0).sum(-1))
        ps = np.minimum(1, 2 * (1 + fewer) / (1 + draws))
        for place, estimate, low, high, p in zip(places, estimates, lows, highs, ps):
            found[place] = Difference(float(estimate), float(low), float(high), float(p), seeds, documents)
    return [difference for difference in found if difference is not None]


def resampled(sums: Floats, counts: Floats, draws: int = DRAWS, seed: int = 0) -> Floats:
    """Draw the estimate from the joint bootstrap of seeds and documents, widened if there are few of either.

    A draw takes S seeds and D documents with replacement, and the same documents for all its seeds. This is the
    pigeonhole bootstrap (Owen 2007, Ann. Appl. Stat. 1:386, who shows that it errs to the wide side if seeds and
    documents interact). With shares u_s, multiplicities w_d and residuals e[s, d] = x[s, d] - t_s n[d], a draw is

        estimate + r (f(S) sum_s u_s (t_s - estimate) + f(D) sum_s u_s (sum_d w_d e[s, d]) / (sum_d w_d n[d])).

    With r = f = 1 this is the plain bootstrap, which is too narrow for two reasons if seeds are few. f(k) =
    sqrt(k / (k - 1)) corrects the variance of k draws from k values (Rao and Wu 1988, JASA 83:231, with as many draws
    as values). r turns the normal shape into a Student t: r^2 = v / chi^2_v, with Satterthwaite's v (1946) from the
    variances of the estimate over seeds and over documents.

    How often a 95 % interval covers the true value, simulated with 3 seeds and 40 documents:

        source of the variance      plain          with f         with f and r
        seeds                       73 %           79 %           93 %
        documents                   95 %           95 %           96 %
        single (seed, document)     99 % or more   99 % or more   99 % or more

    Args: sums (C, S, D) and counts (C, D) of C differences of the same shape. D must be at least 2.
    Returns: (C, draws). With one seed, the draws account for documents only.
    """
    comparisons, seeds, documents = sums.shape
    by_seed = sums.sum(-1) / counts.sum(-1)[:, None]
    estimate = by_seed.mean(-1)
    from_mean = by_seed - estimate[:, None]
    residuals = sums - by_seed[..., None] * counts[:, None]
    generator = np.random.default_rng(seed)
    shares = generator.multinomial(seeds, np.full(seeds, 1 / seeds), draws) / seeds
    drawn = _few(seeds) * from_mean @ shares.T
    flat = residuals.reshape(-1, documents).T
    rows = max(1, _CHUNK_BYTES // (8 * max(documents, comparisons * seeds)))
    for start in range(0, draws, rows):
        part = slice(start, min(start + rows, draws))
        times = _multiplicities(generator, part.stop - start, documents)
        products = (times @ flat).reshape(-1, comparisons, seeds)
        over_seeds = np.einsum("rcs,rs->rc", products, shares[part])
        drawn[:, part] += _few(documents) * (over_seeds / (times @ counts.T)).T
    freedom = degrees_of_freedom(*squared_errors(from_mean, residuals.mean(1), counts), seeds, documents)
    for place, v in enumerate(freedom):  # each from its own generator: a difference does not depend on its neighbours
        drawn[place] *= np.sqrt(v / np.random.default_rng((seed, 1)).chisquare(v, draws))
    return estimate[:, None] + drawn


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted by Holm (1979), in order: the largest (m - j) p_(j) so far, j = 0..m-1, at most 1."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    order = sorted(range(len(p_values)), key=lambda place: p_values[place])
    for rank, place in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = largest
    return adjusted


def smallest_p(seeds: int) -> float:
    """Return the smallest p that this number of seeds can tell; a smaller p only means that it is below this value.

    Few seeds say little about how seeds vary. In a simulation in which nothing differs and only seeds vary (4,000
    differences of 50 documents), small p-values occur with these probabilities:

        seeds        2       3       5
        p < 0.0005   0.015   0.002   0.0015
        p < 0.01     0.046   0.016   0.007
    """
    return 0.01 if seeds < _MANY_SEEDS else 0.001


def adjust_holm(family: Sequence[Difference]) -> list[Difference]:
    """Return the differences with p adjusted for their number. One whose p is NaN is not a test: it stays as it is."""
    tested = [place for place, difference in enumerate(family) if not math.isnan(difference.p)]
    adjusted = dict(zip(tested, holm([family[place].p for place in tested])))
    return [dataclasses.replace(difference, p_holm=adjusted.get(place)) for place, difference in enumerate(family)]


def _split_groups(
    groups: Mapping[tuple[int, ...], list[int]], most: int
) -> Iterator[tuple[tuple[int, ...], list[int]]]:
    """Yield the groups in parts of at most ``most`` members."""
    for shape, places in groups.items():
        for start in range(0, len(places), most):
            yield shape, places[start : start + most]


def _sums(measured: Measured | General, metric: str) -> tuple[Floats, Floats, Floats] | None:
    """Return (documents, sums, counts), each (D,); None if the metric was not measured."""
    if isinstance(measured, General):  # it has no other temperature, and no questions
        measured = Measured(measured.evaluation)
    evaluation = measured.tempered if metric == "tempered" else measured.evaluation
    if evaluation is None:
        return None
    documents = evaluation.documents.numpy()
    if metric in ("answers", WRONG):
        if measured.answers is None or measured.questions is None:
            return None
        questions = measured.questions.numpy().astype(float)
        right = measured.answers.numpy().astype(float)
        return documents, right if metric == "answers" else questions - right, questions
    sums = evaluation.correct if metric == "accuracy" else evaluation.loss_sums
    return documents, sums.numpy().astype(float).round(NATS_DECIMALS), evaluation.tokens.numpy().astype(float)


def _few(count: int) -> float:
    return math.sqrt(count / (count - 1)) if count > 1 else 0.0


def _multiplicities(generator: np.random.Generator, rows: int, documents: int) -> Floats:
    """Return (rows, documents): how often each document occurs in a draw of ``documents`` with replacement."""
    drawn = generator.integers(documents, size=(rows, documents)) + documents * np.arange(rows)[:, None]
    return np.bincount(drawn.ravel(), minlength=rows * documents).reshape(rows, documents).astype(float)
