"""MFT and its control at equal steps and seconds, from the runs that were tried."""

import pytest
import torch

from mft.config import DataConfig
from mft.evaluation.evaluate import Evaluation
from mft_study.arms.kinds import make_arm
from mft_study.arms.setting import Setting
from mft_study.config import StudyConfig
from mft_study.outcome import Findings, Measured, Outcome, Unit
from mft_study.report.equal_budgets import budget_sentences, equal_budgets

ARMS = {
    "full": make_arm("full", lrs=[1]),
    "control": make_arm("control", lrs=[1, 2], epochs=[1, 2]),
    "MFT": make_arm("mask", lrs=[1, 2], epochs=[1, 2, 4]),
    "random": make_arm("random"),
}
REFERENCES = {"full": "control", "control": None, "MFT": "control", "random": "control"}
# (rate, epochs): (loss, seconds); ten steps per epoch
CONTROL = {(1, 1): (2.3, 1.0), (2, 1): (2.2, 1.1), (1, 2): (2.1, 2.0), (2, 2): (2.4, 2.2)}
MFT = {(1, 1): (2.35, 1.5), (1, 2): (2.15, 3.0), (1, 4): (2.0, 6.0), (2, 4): (2.5, 6.5)}


def outcome(arm, setting, found, seed=0, documents=3):
    loss, seconds = found
    ones = torch.ones(documents, dtype=torch.float64)
    measured = None if loss is None else Measured(Evaluation(torch.arange(documents), ones, ones * loss, ones))
    unit = Unit("code", arm, seed, Setting(*map(float, setting)))
    return Outcome(unit, measured, steps=10 * setting[1], seconds=seconds, diverged="nan" if loss is None else None)


def findings(control=CONTROL, mft=MFT, chose=((1, 2), (1, 4)), **options):
    study = StudyConfig(arms=dict(ARMS), domains={"code": DataConfig()})
    outcomes = [outcome("control", setting, found, **options) for setting, found in control.items()]
    outcomes += [outcome("MFT", setting, found, **options) for setting, found in mft.items()]
    outcomes += [outcome("control", (1, 1), (0.1, 0.1), seed=1, **options)]  # the choice ignores other seeds
    chosen = {arm: Setting(*map(float, setting)) for arm, setting in zip(("control", "MFT"), chose)}
    return Findings(study, outcomes, {"code": chosen}, {}, {})


def budgets(**options):
    found = equal_budgets(findings(**options), "code", REFERENCES)
    return {
        (one.what, one.budget): (one.setting, one.control_setting, one.difference and one.difference.estimate)
        for one in found
    }


def test_each_has_its_best_run_within_what_one_of_the_two_chose():
    control, few, most = Setting(1.0, 2.0), Setting(1.0, 2.0), Setting(1.0, 4.0)
    assert budgets() == {
        ("steps", 20): (few, control, pytest.approx(0.05)),
        ("steps", 40): (most, control, pytest.approx(-0.1)),
        ("seconds", 2): (Setting(1.0, 1.0), control, pytest.approx(0.25)),
        ("seconds", 6): (most, control, pytest.approx(-0.1)),
    }


def test_a_control_that_chose_more_steps_is_held_to_the_masks():
    found = budgets(chose=((1, 2), (1, 1)))
    assert found["steps", 10] == (Setting(1.0, 1.0), Setting(2.0, 1.0), pytest.approx(0.15))
    assert found["steps", 20] == (Setting(1.0, 2.0), Setting(1.0, 2.0), pytest.approx(0.05))


def test_runs_that_diverged_and_other_seeds_count_for_nothing():
    found = budgets(control=CONTROL | {(2, 2): (None, 0.5)})
    assert found == budgets()


def test_nothing_within_a_budget_is_said():
    found = equal_budgets(findings(mft={(1, 4): (2.0, 6.0), (1, 1): (None, 1.0)}), "code", REFERENCES)
    steps, seconds = budget_sentences("code", found)
    assert steps == (
        "code, MFT and its control, each in at most so many steps: 20 steps: no run of MFT; 40 steps: "
        "MFT (lr 1, epochs 4) - control (lr 1, epochs 2) -0.1000 [-0.1000, -0.1000]"
    )
    assert "so many seconds: 2.0 s: no run of MFT; 6.0 s: " in seconds


def test_only_masks_with_a_control_are_compared():
    assert {one.arm for one in equal_budgets(findings(), "code", REFERENCES)} == {"MFT"}
    assert equal_budgets(findings(), "code", {"MFT": None}) == []
