"""A study's table, verdicts and numbers, from hand-made findings."""

import json
import math

import numpy as np
import pytest
import torch

from mft.config import DataConfig, MaskConfig
from mft.evaluation.evaluate import Evaluation
from mft_study.arms.kinds import make_arm
from mft_study.arms.setting import Setting
from mft_study.config import StudyConfig
from mft_study.grid import OpenEnd
from mft_study.outcome import Findings, Measured, Outcome, Unit
from mft_study.report.pictures.plots import plot_study
from mft_study.report.remarks import remarks, unsettled_remark
from mft_study.report.statistics import differences, paired
from mft_study.report.table import study_numbers, study_tables
from mft_study.report.verdict import HELPS, INCONCLUSIVE, LOST, NO_EVIDENCE, study_verdicts
from mft_study.report.write import write_study_report

DOCUMENTS = 30
ARMS = {
    "base": make_arm("base"),
    "full fine-tune": make_arm("full", lrs=[1e-5, 3e-5, 1e-4, 3e-4, 1e-3]),
    "control": make_arm("control", lrs=[1e-5, 3e-5, 1e-4, 3e-4, 1e-3]),
    "random mask": make_arm("random"),
    "MFT": make_arm("mask", lrs=[1e-4, 3e-4, 1e-3, 3e-3, 1e-2]),
    "MFT x3": make_arm("average", of="MFT", runs=3),
    "control x3": make_arm("average", of="control", runs=3),
}
LOSSES = {"base": 2.4, "full fine-tune": 2.0, "control": 1.97, "random mask": 2.5, "MFT": 1.95}
LOSSES |= {"MFT x3": 1.93, "control x3": 1.96}


def measured(loss, seed, answers=None, documents=DOCUMENTS, noise=0.002):
    """Return documents that differ in difficulty, equally for all arms; arms and seeds differ by a little noise."""
    own = np.random.default_rng((int(loss * 1e6), seed)).normal(0, noise, documents)
    tokens = np.random.default_rng(7).integers(80, 400, documents)
    per_token = loss + np.random.default_rng(8).normal(0, 0.3, documents) + own
    evaluation = Evaluation(
        torch.arange(documents),
        torch.tensor(tokens, dtype=torch.float64),
        torch.tensor(per_token * tokens),
        torch.tensor(np.round(tokens * np.exp(-loss) + 2)),
    )
    if answers is None:
        return Measured(evaluation, evaluation, 1.1)
    questions = torch.full((documents,), 5)
    return Measured(evaluation, evaluation, 1.1, (questions * answers).round().long(), questions)


def findings(arms=ARMS, test=LOSSES, validation=LOSSES, seeds=(0, 1, 2), domains=("code",), notes=(), **options):
    """Make findings by hand; options: passed to measured() for the test split."""
    domain_data = {name: DataConfig() for name in domains}
    study = StudyConfig(mask=MaskConfig.paper(), arms=dict(arms), domains=domain_data, seeds=list(seeds))

    def split(losses, **extra):
        of = {arm: {seed: measured(losses[arm], seed, **extra) for seed in seeds} for arm in arms}
        if "base" in of:
            of["base"] = dict.fromkeys(seeds, of["base"][seeds[0]])  # one model stands for every seed
        return {domain: dict(of) for domain in domains}

    tested, outcomes, chosen = split(test, **options), [], {}
    for domain in domains:
        for name, arm in arms.items():
            mean = arm.kind == "average"
            settings = (arms[arm.of] if mean else arm).settings(study.mask)
            best = settings[len(settings) // 2]
            chosen.setdefault(domain, {})[name] = best
            tried = [] if mean else [(setting, seeds[0]) for setting in settings]
            for setting, seed in tried + [(best, seed) for seed in seeds if mean or seed != seeds[0]]:
                far = 0 if setting.lr is None else math.log10(setting.lr / best.lr) ** 2
                diverged = "loss is nan" if far > 0.9 and setting.lr > best.lr and arm.kind == "mask" else None
                result = None if diverged else measured(validation[name] + 0.05 * far, seed)
                for part in range(arm.runs if mean else 1):  # part 0 of an average is the mean; it trains nothing
                    seconds = 0.0 if mean and part == 0 else 10.0
                    steps = 0 if setting.lr is None else 40
                    unit = Unit(domain, name, seed, setting, part)
                    outcomes.append(Outcome(unit, result, steps=steps, seconds=seconds, diverged=diverged))
    return Findings(study, outcomes, chosen, split(validation), tested, list(notes))


def without(*names):
    return {name: arm for name, arm in ARMS.items() if name not in names}


SINGLE = without("MFT x3", "control x3")


def said(**changes):
    (paragraph,) = study_verdicts(findings(arms=SINGLE, **changes))
    return paragraph


CLOSE, WORSE = LOSSES | {"MFT": 1.9695}, LOSSES | {"MFT": 1.99}


@pytest.mark.parametrize(
    ("changes", "claim", "why"),
    [
        ({}, HELPS, ". MFT - full fine-tune: -0.05"),
        ({"test": WORSE, "validation": WORSE}, LOST, ". "),
        ({"test": CLOSE, "noise": 0.01}, NO_EVIDENCE, " (MFT is ahead on test, but the interval includes 0"),
        (
            {"test": CLOSE, "noise": 0.03},
            INCONCLUSIVE,
            " (the interval is ±0.0162, too wide to tell a difference of 0.01 from none: about 3 times as many test "
            "documents and seeds are needed). MFT - full fine-tune: ",
        ),
        ({"test": LOSSES | {"MFT": 1.8}, "noise": 0.03}, HELPS, ". "),  # large, however wide its interval
        ({"validation": WORSE}, NO_EVIDENCE, " (MFT is ahead on test, but validation disagrees)"),
        ({"test": WORSE}, NO_EVIDENCE, " (control is ahead on test, but validation disagrees)"),
    ],
)
def test_a_claim_needs_interval_holm_and_validation_to_agree(changes, claim, why):
    text = said(**changes)
    assert f"MFT: {claim}{why}" in text
    assert [one for one in (HELPS, LOST, NO_EVIDENCE, INCONCLUSIVE) if one in text] == [claim]


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"documents": 7}, "7 test documents, at least 20 are needed"),
        ({"documents": 1}, "1 test document, at least 20 are needed"),
        ({"seeds": (0,)}, "a single seed, at least 2 are needed, better 3"),
        ({"arms": SINGLE | {"MFT": make_arm("mask", lrs=[1e-3])}}, "MFT tried 1 rate, at least 3 are needed"),
        (
            {"arms": SINGLE | {"control": make_arm("control", lrs=[1e-3])}},
            "control tried 1 rate, at least 3 are needed",
        ),
    ],
)
def test_a_study_too_small_to_tell_says_first_that_nothing_can_be_concluded(changes, why):
    study = findings(**{"arms": SINGLE} | changes)
    (text,) = study_verdicts(study)
    assert text.startswith(f"code. MFT: {INCONCLUSIVE} ({why}). MFT - full fine-tune: -0.0")
    assert not any(claim in text for claim in (HELPS, LOST, NO_EVIDENCE, "nan"))
    assert ("A single seed: the intervals know of documents only" in text) == (why.startswith("a single seed"))


def test_no_validation_no_claim():
    study = findings(arms=SINGLE)
    del study.validation["code"]["MFT"]
    assert f"{NO_EVIDENCE} (MFT is ahead on test, but there is no validation difference" in study_verdicts(study)[0]


def test_many_comparisons_take_the_claim_of_a_weak_one_away():
    def claims(masks):
        names = [f"MFT {i}" for i in range(masks)]
        arms = without("MFT", "MFT x3", "control x3") | {name: ARMS["MFT"] for name in names}
        losses = LOSSES | dict.fromkeys(names, 1.9695) | {names[0]: 1.9545}
        return study_verdicts(findings(arms=arms, test=losses, validation=losses, noise=0.03))[0].split("MFT 1:")[0]

    assert f"MFT 0: {HELPS}" in claims(1)
    assert f"MFT 0: {NO_EVIDENCE} (MFT is ahead on test, but not after Holm's correction)" in claims(12)


def test_holm_counts_the_comparisons_of_all_domains():
    one, two = (
        study_tables(findings(arms=SINGLE, domains=names, noise=0.05))["code"].row("MFT").minus_control["loss"]
        for names in (("code",), ("code", "text"))
    )
    assert one.p_holm == one.p < 0.5
    assert two.p_holm == 2 * two.p == 2 * one.p


def test_without_a_control_there_is_no_verdict():
    (text,) = study_verdicts(findings(arms={name: SINGLE[name] for name in ("full fine-tune", "MFT")}))
    assert "no control arm" in text
    assert "so there is no verdict" in text
    assert "MFT - full fine-tune: -0.05" in text
    for claim in (HELPS, LOST, NO_EVIDENCE):
        assert claim not in text


def test_averages_are_held_against_averages_of_as_many_runs():
    tables = study_tables(findings())
    row = tables["code"].row("MFT x3")
    assert row.against == "control x3"
    expected = paired(findings().test["code"]["MFT x3"], findings().test["code"]["control x3"])
    assert row.minus_control["loss"].estimate == pytest.approx(differences([expected])[0].estimate)
    assert tables["code"].row("control x3").against is None
    assert "MFT x3 - control x3: -0.03" in study_verdicts(findings())[0]


@pytest.mark.parametrize("runs", [None, 2])
def test_an_average_without_its_match_is_not_compared(runs):
    arms = without("control x3") | (
        {} if runs is None else {"control x2": make_arm("average", of="control", runs=runs)}
    )
    losses = LOSSES | {"control x2": 1.96}
    (text,) = study_verdicts(findings(arms=arms, test=losses, validation=losses))
    assert "not compared: no arm averages 3 runs of control, and a single run is no match" in text
    assert "MFT x3: " not in text


def test_table_holds_what_statistics_say():
    study = findings(answers=0.4)
    row = study_tables(study)["code"].row("MFT")
    test = study.test["code"]
    for metric in ("loss", "tempered", "accuracy", "answers"):
        pair = paired(test["MFT"], test["control"], metric)
        expected, found = differences([pair])[0], row.minus_control[metric]
        for name in ("estimate", "low", "high", "p"):
            assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-6, abs=1e-12)
    assert row.loss == pytest.approx(np.mean([test["MFT"][seed].evaluation.loss for seed in (0, 1, 2)]))
    assert row.exact == pytest.approx(0.4)
    assert row.validation == pytest.approx(-0.02, abs=0.002)
    assert (row.tried, row.seconds, row.seconds_tried) == (5, 10, 70)


def test_an_average_costs_all_its_runs_and_tries_none():
    row = study_tables(findings())["code"].row("MFT x3")
    assert row.tried == 0
    assert row.seconds == 30  # the run that it shares with its arm, and two more


def test_remarks_warn_of_a_used_test_split_few_documents_and_missing_seeds():
    study = findings(documents=19)
    study.test_openings = 3
    del study.test["code"]["MFT"][2]
    del study.test["code"]["random mask"]
    text = "\n".join(remarks(study, study_tables(study)))
    assert "opened 3 times" in text
    assert "optimistic" in text
    assert "opened once" not in text
    assert "19 test documents, fewer than 20: its intervals are rough, and nothing can be concluded" in text
    assert "code, MFT: compared in 2 of 3 seeds" in text
    assert "code was not tested for random mask" in text


def test_choices_at_an_end_of_their_grid_are_one_remark_and_mark_the_verdicts_that_rest_on_them():
    study = findings(
        arms=SINGLE | {"MFT too": ARMS["MFT"]}, test=LOSSES | {"MFT too": 1.96}, validation=LOSSES | {"MFT too": 1.96}
    )
    study.open_ends = [OpenEnd("code", "MFT", "rate", 1e-2, True, "extensions=9")]
    few = OpenEnd("code", "MFT", "number of epochs", 4, False, "extensions=3 max_epochs=8")
    assert unsettled_remark([*study.open_ends, few]).endswith(
        ": code, MFT: largest rate 0.01, smallest number of epochs 4. Run the same command with extensions=9 "
        "max_epochs=8 to go on."
    )
    assert remarks(study, study_tables(study))[0] == unsettled_remark(study.open_ends)
    assert study_numbers(study)["open_ends"] == [vars(study.open_ends[0])]
    (text,) = study_verdicts(study)
    assert f"MFT: {HELPS} (unsettled, at an end of its grid: MFT's rate). " in text
    assert f"MFT too: {HELPS}. " in text  # neither MFT too nor the control is at an end of its grid
    study.open_ends = [OpenEnd("code", "full fine-tune", "number of epochs", 4, True, "max_epochs=8")]
    (text,) = study_verdicts(study)
    assert text.count("(unsettled, at an end of its grid: full fine-tune's number of epochs)") == 2  # all begin there
    study.open_ends = [OpenEnd("text", "MFT", "rate", 1e-2, True, "extensions=9")]
    assert "unsettled" not in study_verdicts(study)[0]


def test_json_holds_the_numbers_and_goes_round(tmp_path):
    study = findings()
    write_study_report(study, tmp_path, {"commit": "abc"})
    numbers = json.loads((tmp_path / "table.json").read_text(), parse_constant=pytest.fail)
    assert numbers["environment"] == {"commit": "abc"}
    rows = {row["arm"]: row for row in numbers["domains"]["code"]["rows"]}
    expected = study_tables(study)["code"].row("MFT").minus_control["loss"]
    assert rows["MFT"]["minus_control"]["loss"] == {name: value for name, value in vars(expected).items()}
    assert rows["MFT"]["conclusion"] == HELPS
    assert rows["control"]["conclusion"] is None
    assert rows["MFT"]["setting"] == vars(Setting(1e-3, 1, 0.9))
    diverged = [trial for trial in numbers["domains"]["code"]["trials"] if trial["diverged"] is not None]
    assert diverged
    assert all(trial["validation_loss"] is None for trial in diverged)
    plot_study(numbers, tmp_path / "again.png")
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "plot.png").read_bytes()
