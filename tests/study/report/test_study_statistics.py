"""The study's intervals compared with plain loops and with known variances; Holm's correction by hand."""

import dataclasses
import math
import tracemalloc

import numpy as np
import pytest
import torch
from scipy import stats

from mft.evaluation.evaluate import Evaluation, paired_difference
from mft_study.outcome import Measured
from mft_study.report import statistics
from mft_study.report.statistics import Paired, adjust_holm, differences, holm, paired, resampled

ROUNDING = 1e-6  # nats per token: sums of ten tokens are rounded to 1e-4


def measured(generator, documents=6, shift=0.0, tokens=None):
    tokens = np.arange(10, 10 + documents) if tokens is None else tokens
    losses = generator.normal(2 + shift, 0.3, documents) * tokens
    correct = generator.integers(0, 10, documents)
    evaluation = Evaluation(
        torch.arange(documents), *(torch.tensor(v, dtype=torch.float64) for v in (tokens, losses, correct))
    )
    tempered = dataclasses.replace(evaluation, loss_sums=evaluation.loss_sums * 0.9)
    questions = torch.arange(documents) + 1
    return Measured(evaluation, tempered, 1.2, torch.tensor(generator.integers(0, 2, documents)) * questions, questions)


def arms(seeds=3, **options):
    generator = np.random.default_rng(0)
    return ({seed: measured(generator, **options) for seed in range(seeds)} for _ in range(2))


def simulated(components, seeds, documents, repeats, truth=0.3):
    """Simulate differences as (C, S, D) sums and (C, D) counts; components: deviation over seeds, documents, both."""
    generator = np.random.default_rng(1)
    counts = generator.integers(50, 400, (repeats, documents)).astype(float)
    shapes = ((repeats, seeds, 1), (repeats, 1, documents), (repeats, seeds, documents))
    means = truth + sum(sd * generator.standard_normal(shape) for sd, shape in zip(components, shapes))
    return means * counts[:, None], counts


def test_the_estimate_is_the_mean_over_seeds_of_the_ratio_of_sums():
    a, b = arms()
    expected = []
    for seed in a:
        differences_of_documents = a[seed].evaluation.loss_sums - b[seed].evaluation.loss_sums
        expected.append((differences_of_documents.sum() / a[seed].evaluation.tokens.sum()).item())
    (difference,) = differences([paired(a, b)])
    assert difference.estimate == pytest.approx(sum(expected) / 3, abs=ROUNDING)
    assert (difference.seeds, difference.documents) == (3, 6)


@pytest.mark.parametrize(
    ("metric", "ratio"),
    [
        ("loss", lambda m: m.evaluation.loss),
        ("tempered", lambda m: 0.9 * m.evaluation.loss),
        ("accuracy", lambda m: m.evaluation.accuracy),
        ("answers", lambda m: (m.answers.sum() / m.questions.sum()).item()),
    ],
)
def test_each_metric_is_the_difference_of_the_arms_own(metric, ratio):
    a, b = arms()
    expected = np.mean([ratio(a[seed]) - ratio(b[seed]) for seed in a])
    assert differences([paired(a, b, metric)])[0].estimate == pytest.approx(expected, abs=ROUNDING)


def test_draws_are_those_of_a_plain_loop():
    """Write out every formula of the docstring for three seeds and four documents, with the same random numbers."""
    generator = np.random.default_rng(5)
    sums, counts = generator.normal(0.2, 1, (3, 4)), np.array([1.0, 2, 3, 4])
    draws = resampled(sums[None], counts[None], draws=50, seed=9)[0]
    t = [sums[s].sum() / counts.sum() for s in range(3)]
    estimate = sum(t) / 3
    over_seeds = sum((x - estimate) ** 2 for x in t) / 2 / 3
    e = [[sums[s][d] - t[s] * counts[d] for d in range(4)] for s in range(3)]
    over_documents = sum((sum(e[s][d] for s in range(3)) / 3) ** 2 for d in range(4)) * 4 / 3 / counts.sum() ** 2
    v = (over_seeds + over_documents) ** 2 / (over_seeds**2 / 2 + over_documents**2 / 3)
    chi = np.random.default_rng((9, 1)).chisquare(v, 50)
    generator = np.random.default_rng(9)
    shares = generator.multinomial(3, [1 / 3] * 3, 50) / 3
    documents = generator.integers(4, size=(50, 4))
    for r in range(50):
        seeds_part = sum(shares[r][s] * (t[s] - estimate) for s in range(3))
        tokens = sum(counts[d] for d in documents[r])
        documents_part = sum(shares[r][s] * sum(e[s][d] for d in documents[r]) for s in range(3)) / tokens
        deviation = math.sqrt(3 / 2) * seeds_part + math.sqrt(4 / 3) * documents_part
        assert draws[r] == pytest.approx(estimate + math.sqrt(v / chi[r]) * deviation)


@pytest.mark.parametrize(
    "components",
    [(0, 1, 0), (0.3, 1, 0.5), (1, 0.3, 0.3)],
    ids=["documents", "both", "seeds"],
)
def test_95_percent_intervals_of_3_seeds_and_40_documents_cover(components):
    sums, counts = simulated(components, seeds=3, documents=40, repeats=600)
    found = differences([Paired(*pair) for pair in zip(sums, counts)], draws=1000)
    covered = np.mean([difference.low <= 0.3 <= difference.high for difference in found])
    assert 0.90 <= covered <= 0.98


def test_p_is_below_5_percent_exactly_where_the_interval_excludes_zero():
    sums, counts = simulated((0.1, 1, 0.3), seeds=3, documents=40, repeats=200)
    found = differences([Paired(*pair) for pair in zip(sums, counts)], draws=1999)
    excluded = [difference.low > 0 or difference.high < 0 for difference in found]
    assert 20 < sum(excluded) < 180
    for difference, excludes in zip(found, excluded):
        assert abs(difference.p - 0.05) < 0.002 or (difference.p < 0.05) == excludes


def test_p_counts_the_rarer_side_twice_and_never_is_zero():
    assert differences([Paired(np.full((3, 5), -1.0), np.ones(5))], draws=999)[0].p == 2 / 1000
    assert differences([Paired(np.zeros((3, 5)), np.ones(5))], draws=999)[0].p == 1
    pair = Paired(np.random.default_rng(2).normal(0.3, 1, (3, 20)), np.ones(20))
    draws = resampled(pair.sums[None], pair.counts[None], 999)[0]
    assert differences([pair], draws=999)[0].p == pytest.approx(
        2 * (1 + min((draws <= 0).sum(), (draws >= 0).sum())) / 1000
    )


def test_a_single_seed_leaves_documents_alone():
    """The interval is that of paired_difference, which considers documents only."""
    generator = np.random.default_rng(3)
    a, b = ({0: measured(generator, documents=200)} for _ in range(2))
    (difference,) = differences([paired(a, b)])
    estimate, error = paired_difference(a[0].evaluation, b[0].evaluation)
    assert difference.estimate == pytest.approx(estimate, abs=ROUNDING)
    width = stats.t(199).ppf(0.975) * error
    assert difference.high - estimate == pytest.approx(width, rel=0.07)
    assert estimate - difference.low == pytest.approx(width, rel=0.07)


def test_a_single_document_has_no_interval():
    (difference,) = differences([Paired(np.ones((3, 1)), np.ones(1))])
    assert difference.estimate == 1
    assert all(math.isnan(value) for value in (difference.low, difference.high, difference.p))


def test_a_difference_does_not_depend_on_its_neighbours_or_on_chunks(monkeypatch):
    generator = np.random.default_rng(4)
    pairs = [Paired(generator.normal(0, 1, (3, d)), generator.integers(1, 9, d).astype(float)) for d in (7, 9, 7, 7)]
    together = differences(pairs, draws=500)
    monkeypatch.setattr(statistics, "_CHUNK_BYTES", 8 * 21 * 13)
    monkeypatch.setattr(statistics, "_DRAWN_BYTES", 2 * 8 * 500)
    for found in (differences(pairs, draws=500), [differences([pair], draws=500)[0] for pair in pairs]):
        for one, other in zip(found, together, strict=True):
            for value, expected in zip(dataclasses.astuple(one), dataclasses.astuple(other)):
                assert value == (expected if expected is None else pytest.approx(expected))


def test_memory_stays_below_200_mb():
    pair = Paired(np.ones((3, 5000)), np.ones(5000))
    tracemalloc.start()
    differences([pair] * 4, draws=2000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200e6


def test_only_seeds_of_both_arms_are_compared():
    a, b = arms()
    del a[0], b[2]
    assert differences([paired(a, b)])[0].seeds == 1
    del a[1]
    assert paired(a, b) is None


def test_what_was_not_measured_is_not_compared():
    a, b = arms()
    b[1] = dataclasses.replace(b[1], tempered=None, answers=None)
    assert paired(a, b, "tempered") is None
    assert paired(a, b, "answers") is None
    assert paired(a, b) is not None


def test_documents_without_a_count_are_left_out():
    a, b = arms()
    for runs in (a, b):
        for run in runs.values():
            run.questions[2] = run.answers[2] = 0
    pair = paired(a, b, "answers")
    assert pair.sums.shape == (3, 5)
    assert pair.counts.tolist() == [1, 2, 4, 5, 6]


def test_other_documents_or_tokens_are_an_error():
    a, b = arms()
    b[2].evaluation.documents[0] = 77
    with pytest.raises(ValueError, match="a and b must be measured on the same documents in every seed"):
        paired(a, b)
    a, _ = arms()
    other, _ = arms(tokens=np.arange(20, 26))
    with pytest.raises(ValueError, match="got 6 documents that count 75, and 6 that count 135"):
        paired(a, other)


def test_holm_of_a_worked_example():
    # In order: 0.01 x 4 = 0.04, 0.02 x 3 = 0.06, 0.03 x 2 = 0.06, 0.04 x 1 -> 0.06 (never below the one before).
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.5, 0.6]) == [1, 1]
    assert holm([0.03]) == [0.03]
    assert holm([]) == []


def test_holm_skips_what_is_no_test():
    found = differences([Paired(np.ones((3, 1)), np.ones(1)), Paired(np.ones((3, 4)), np.ones(4))], draws=99)
    adjusted = adjust_holm(found)
    assert adjusted[0].p_holm is None
    assert adjusted[1].p_holm == found[1].p
