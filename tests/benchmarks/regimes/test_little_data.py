"""The study of little data: what it declares, and that it fits into an hour on two cores."""

from benchmarks.records import ROOT
from mft_study.load import load_study
from mft_study.outcome import Unit
from mft_study.plan import left_to_do, work_of

STUDY = ROOT / "benchmarks" / "studies" / "little-data.yaml"
TOKENS_PER_SECOND = 6_000  # trained per core of a busy Zen 4 by this model, all layers, weights or scores
BASE_MINUTES = 6  # to train the base model from scratch, from the stored run


def test_each_trained_arm_meets_both_sizes_and_three_lengths_with_five_seeds():
    study = load_study(STUDY)
    assert [data.max_train_tokens for data in study.domains.values()] == [4096, 16384]
    assert {tuple(arm.epochs) for arm in study.arms.values() if arm.lrs} == {(4, 16, 64)}
    assert len(study.seeds) == 5
    assert study.max_epochs == 64


def test_it_fits_an_hour_on_two_cores():
    study = load_study(STUDY)
    _, work = left_to_do(study, [], [])
    longest = [
        work_of(study, Unit(domain, name, 0, max(arm.settings(study.mask), key=lambda setting: setting.epochs or 0)))
        for domain in study.domains
        for name, arm in study.arms.items()
        if arm.lrs
    ]
    checkpoints = (study.checkpoints - 1) * 2 * 3 * 13 * 16384 / 2  # evaluations: forward only, twice as fast
    grown = study.extensions / 6 * sum(longest)  # grids may grow; this share was used in the stored run
    minutes = BASE_MINUTES + (work + checkpoints + grown) / TOKENS_PER_SECOND / study.workers / 60
    assert minutes < 60
