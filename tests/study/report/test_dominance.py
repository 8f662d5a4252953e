"""Gain against forgetting, from hand-made findings: columns, which arm dominates which, curves."""

import numpy as np
import pytest
from test_study_report import findings as on_the_domain
from test_study_report import measured

from mft.config import DataConfig
from mft_study.arms.kinds import make_arm
from mft_study.arms.setting import Setting
from mft_study.config import StudyConfig
from mft_study.grid import OpenEnd
from mft_study.outcome import General
from mft_study.report.dominance import OnLoss, comparisons, draws_of, is_mft, rivals_of, verdict
from mft_study.report.judge import side
from mft_study.report.pictures.forgetting import curves
from mft_study.report.remarks import remarks
from mft_study.report.statistics import DRAWS, Difference, adjust_holm, differences, paired
from mft_study.report.table import reference_of, study_numbers, study_tables
from mft_study.report.verdict import HELPS, study_verdicts
from mft_study.report.write import write_study_report

RATES = [1e-5, 3e-5, 1e-4, 3e-4, 1e-3]
ARMS = {
    "base": make_arm("base"),
    "full fine-tune": make_arm("full", lrs=RATES),
    "control": make_arm("control", lrs=RATES),
    "random mask": make_arm("random"),
    "temperature": make_arm("temperature"),
    "MFT": make_arm("mask", lrs=RATES),
    "part of control": make_arm("interpolated", of="control", alphas=[0.5, 1.0]),
    "part of full": make_arm("interpolated", of="full fine-tune", alphas=[0.5]),
}
# For each arm: loss on the domain, loss on the other text.
BOTH = {
    "base": (2.4, 1.5),
    "full fine-tune": (2.0, 1.7),
    "control": (1.97, 1.8),
    "random mask": (2.5, 2.3),
    "temperature": (2.0, 1.7),
    "MFT": (1.95, 1.75),
    "part of control": (1.98, 1.74),
    "part of full": (2.1, 1.6),
}


def general(loss, seed, documents=25, noise=0.002):
    found = measured(loss, seed, documents=documents, noise=noise).evaluation
    return General(found, 0.1 * found.tokens)  # 0.1 nats per token


def findings(both=BOTH, arms=ARMS, texts=("other",), seeds=(0, 1, 2), validation=None, documents=30, noise=0.002):
    """Make findings by hand.

    both: losses by arm. validation: losses by arm on that split, if they differ. Texts beyond the first have the same
    loss in all arms.
    """
    held = both if validation is None else validation
    test, on_validation = ({arm: losses[arm][0] for arm in arms} for losses in (both, held))
    options = {"seeds": seeds, "documents": documents, "noise": noise}
    found = on_the_domain(arms=arms, test=test, validation=on_validation, **options)
    found.study.general = {text: DataConfig(source="headers") for text in texts}

    def on_texts(loss, seed):
        few = 1 if documents == 1 else 25
        return {text: general(loss if text == texts[0] else 1.0, seed, few, noise) for text in texts}

    for outcome in found.outcomes:
        arm, is_chosen = outcome.unit.arm, outcome.unit.setting == found.chosen["code"][outcome.unit.arm]
        outcome.bytes, outcome.general = 1_000_000, on_texts(held[arm][1] if is_chosen else 9.0, outcome.unit.seed)
    found.general = {"code": {arm: {seed: on_texts(both[arm][1], seed) for seed in seeds} for arm in arms}}
    if "base" in arms:
        found.general["code"]["base"] = {seeds[0]: found.general["code"]["base"][seeds[0]]}
    return found


def against(rival, arm="MFT", **options):
    (found,) = [one for one in comparisons(findings(**options))["code"] if (one.arm, one.rival) == (arm, rival)]
    return found


def shown(difference):
    return difference.low, difference.estimate, difference.high, difference.p


# ------------------------------------------------------------------------------------------ columns


def test_a_texts_column_holds_means_over_seeds_and_paired_differences():
    found = findings()
    on = study_tables(found)["code"].row("part of full").general["other"]
    tested = {arm: {seed: on["other"] for seed, on in runs.items()} for arm, runs in found.general["code"].items()}
    tested["base"] = dict.fromkeys((0, 1, 2), tested["base"][0])  # one model for all seeds
    runs = tested["part of full"]
    assert on.loss == pytest.approx(np.mean([run.evaluation.loss for run in runs.values()]))
    assert on.kl == pytest.approx(0.1)
    pairs = [paired(runs, tested[reference]) for reference in ("full fine-tune", "base")]
    for name, expected in zip(("minus_full", "minus_start"), differences(pairs), strict=True):
        assert shown(getattr(on, name)) == pytest.approx(shown(expected), rel=1e-6)
    assert on.minus_full.estimate == pytest.approx(-0.1, abs=0.02)
    assert on.minus_start.estimate == pytest.approx(0.1, abs=0.02)


def test_an_arms_start_is_where_it_began_and_nothing_is_held_against_itself():
    rows = {row.arm: row for row in study_tables(findings())["code"].rows}
    starts = {arm: row.start for arm, row in rows.items()}
    assert starts == dict.fromkeys(ARMS, "full fine-tune") | {"base": None} | dict.fromkeys(
        ("full fine-tune", "part of full"), "base"
    )
    assert rows["full fine-tune"].general["other"].minus_full is None
    assert rows["full fine-tune"].general["other"].minus_start.estimate == pytest.approx(0.2, abs=0.02)
    assert rows["base"].general["other"].minus_start is None
    assert rows["base"].general["other"].minus_full.seeds == 3  # one model for all seeds


def test_a_text_of_a_domains_own_name_is_none_of_it():
    found = findings(texts=("code", "other"))
    assert found.study.general_of("code") == ["other"]
    table = study_tables(found)["code"]
    assert set(table.row("MFT").general) == {"other"}
    assert {one.text for one in table.comparisons} == {"other"}


# ------------------------------------------------------------------------------------------ dominance


# An interval, and its p after Holm's correction.
LOWER, HIGHER = (-0.03, -0.01, 0.001), (0.01, 0.03, 0.001)
NONE = (-0.004, 0.006, 1.0)
WORSE_BY_ITS_INTERVAL, BETTER_BY_ITS_INTERVAL = (0.001, 0.008, 0.3), (-0.008, -0.001, 0.3)
WIDE_UP, WIDE_DOWN = (-0.001, 0.02, 0.3), (-0.02, 0.001, 0.3)


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ((LOWER, LOWER), "dominates"),
        ((LOWER, NONE), "dominates"),
        ((LOWER, WIDE_DOWN), "dominates"),
        ((LOWER, BETTER_BY_ITS_INTERVAL), "dominates"),
        ((LOWER, WORSE_BY_ITS_INTERVAL), "better by one"),
        ((LOWER, WIDE_UP), "better by one"),
        ((LOWER, HIGHER), "trade-off"),
        ((HIGHER, HIGHER), "dominated"),
        ((HIGHER, NONE), "dominated"),
        ((HIGHER, WIDE_UP), "dominated"),
        ((HIGHER, WIDE_DOWN), "worse by one"),
        ((HIGHER, BETTER_BY_ITS_INTERVAL), "worse by one"),
        ((NONE, NONE), "level"),
        ((NONE, WORSE_BY_ITS_INTERVAL), "level"),  # by less than the margin that matters
        ((NONE, WIDE_UP), "undecided"),
    ],
)
def test_a_verdict_takes_both_losses(losses, expected):
    def on_loss(low, high, p_holm):
        difference = Difference((low + high) / 2, low, high, p_holm / 10, 3, 30, p_holm)
        return OnLoss(difference, difference.estimate, side(difference, difference.estimate)[0])

    one, other = (on_loss(*loss) for loss in losses)
    assert verdict(one, other) == verdict(other, one) == expected


def test_a_larger_family_makes_no_arm_dominate():
    """MFT gains on the domain, but its uncorrected interval on the text lies above 0. No correction may hide that."""
    others = [f"MFT {i}" for i in range(4)]
    arms = {name: ARMS[name] for name in ("full fine-tune", "control", "MFT")} | dict.fromkeys(others, ARMS["MFT"])
    both = BOTH | {"MFT": (1.95, 1.81)} | dict.fromkeys(others, BOTH["control"])
    found = comparisons(findings(arms=arms, both=both, noise=0.012))["code"]
    (one,) = [one for one in found if (one.arm, one.rival) == ("MFT", "control")]
    assert one.domain.side == -1
    assert one.general.difference.low > 0
    assert one.general.difference.p_holm > 0.05
    assert one.verdict == "better by one"


def test_rivals_are_the_tuned_arms_that_are_no_masks():
    arms = ARMS | {"part of MFT": make_arm("interpolated", of="MFT", alphas=[0.5])}
    arms |= {f"mean of {n} {of}": make_arm("average", of=of, runs=n) for of in ("MFT", "control") for n in (2, 3)}
    study = findings(arms=arms, both=dict.fromkeys(arms, (1.0, 1.0))).study
    masks = {"MFT", "part of MFT", "mean of 2 MFT", "mean of 3 MFT"}
    assert {arm for arm in arms if is_mft(study, arm)} == masks
    rivals = {"full fine-tune", "control", "part of control", "part of full", "mean of 2 control", "mean of 3 control"}
    assert set(rivals_of(study, "MFT")) == set(rivals_of(study, "part of MFT")) == rivals
    assert rivals_of(study, "mean of 3 MFT") == ["mean of 3 control"]
    assert reference_of(study, "part of MFT") == "part of control"
    assert reference_of(study, "part of control") is None


def test_each_kind_of_verdict_is_found():
    assert against("control").verdict == "dominates"  # better by both losses
    assert against("part of control").verdict == "trade-off"
    assert against("full fine-tune").verdict == "trade-off"
    assert against("control", both=BOTH | {"MFT": (1.99, 1.9)}).verdict == "dominated"
    assert against("control", both=BOTH | {"MFT": BOTH["control"]}).verdict == "level"
    assert against("control", both=BOTH | {"MFT": (1.97, 1.7)}).verdict == "dominates"  # level by one is enough
    assert against("control", both=BOTH | {"MFT": (1.97, 1.9)}).verdict == "dominated"


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"documents": 1}, "1 test document, at least 20 are needed"),
        ({"documents": 19}, "19 test documents, at least 20 are needed"),
        ({"seeds": (0,)}, "a single seed, at least 2 are needed, better 3"),
        ({"arms": ARMS | {"MFT": make_arm("mask", lrs=RATES[:2])}}, "MFT tried 2 rates, at least 3 are needed"),
    ],
)
def test_with_too_little_nothing_is_concluded_of_any_rival(changes, why):
    assert against("control", **changes).verdict == "undecided"
    (text,) = study_verdicts(findings(**changes))
    first = f"MFT: nothing can be concluded ({why}). MFT is not judged against full fine-tune, control, "
    assert text.startswith(f"code, and what is left of other. {first}")
    assert "nan" not in text


@pytest.mark.parametrize("loss", [0, 1])
def test_a_loss_by_which_validation_disagrees_is_not_shown(loss):
    other = {0: (1.99, 1.75), 1: (1.95, 1.85)}[loss]
    found = against("control", validation=BOTH | {"MFT": other})
    assert [found.domain.side, found.general.side] == [0 if place == loss else -1 for place in (0, 1)]
    assert found.verdict == "dominates"  # by the other loss


def test_without_validation_of_the_text_its_loss_is_not_shown():
    found = findings()
    for outcome in found.outcomes:
        outcome.general = {}
    (one,) = [one for one in comparisons(found)["code"] if one.rival == "control"]
    assert one.general.validation is None
    assert (one.domain.side, one.general.side) == (-1, 0)


def test_holm_runs_over_all_pairs_both_losses_and_all_texts():
    found = findings(texts=("other", "third"), noise=0.05)
    listed = comparisons(found)["code"]
    assert [(one.text, one.rival) for one in listed] == [
        (text, rival)
        for text in ("other", "third")
        for rival in ("full fine-tune", "control", "part of control", "part of full")
    ]
    own = {one.rival: one.domain.difference for one in listed}  # once for both texts
    family = [*own.values(), *(one.general.difference for one in listed)]
    assert len(family) == 12
    assert sorted(d.p_holm for d in adjust_holm(family)) == sorted(d.p_holm for d in family)
    assert any(d.p_holm > d.p for d in family)
    assert "over these 12 differences" in " ".join(remarks(found, study_tables(found)))


def test_a_large_family_has_draws_enough_for_its_least_p(monkeypatch):
    assert draws_of(12) == DRAWS
    assert 600 * 2 / (1 + draws_of(600)) == pytest.approx(0.01, rel=1e-3)
    monkeypatch.setattr("mft_study.report.dominance._DRAWS_EACH", 2000)  # so that a family of 8 is already large
    found = [one.domain.difference.p for one in comparisons(findings())["code"]]
    assert min(found) == pytest.approx(2 / (1 + 8 * 2000))


# ------------------------------------------------------------------------------------------ words and files


def test_the_verdict_is_of_dominance_and_has_both_differences():
    (text,) = study_verdicts(findings())
    assert text.startswith("code, and what is left of other. MFT dominates control; gains more and forgets more than ")
    assert "MFT - control: code -0.0" in text
    assert "; other -0.05" in text
    assert text.count("Holm-adjusted p <0.01") == 2
    assert HELPS not in text
    (text,) = study_verdicts(findings(both=BOTH | {"MFT": (1.5, 1.4)}))
    assert "MFT dominates every rival: full fine-tune, control, part of control, part of full." in text
    (text,) = study_verdicts(findings(both=BOTH | {"MFT": (1.99, 1.72)}))
    assert "gains less and forgets less than control" in text


def test_interpolated_masks_are_held_against_the_interpolated_control_alone():
    arms = {name: ARMS[name] for name in ("full fine-tune", "control", "MFT")}
    arms["part of MFT"] = make_arm("interpolated", of="MFT", alphas=[0.5])
    both = dict.fromkeys(arms, (1.0, 1.0))
    (text,) = study_verdicts(findings(arms=arms, both=both, texts=()))
    assert "part of MFT - full fine-tune: +0.0000 [" in text
    assert "; not compared: no arm lies between control and its start." in text
    arms["part of control"] = ARMS["part of control"]
    (text,) = study_verdicts(findings(arms=arms, both=dict.fromkeys(arms, (1.0, 1.0)), texts=()))
    assert "; part of MFT - part of control: +0.0000 [" in text


def test_a_verdict_of_dominance_that_rests_on_an_end_of_a_grid_is_marked():
    study = findings()
    assert "Unsettled" not in study_verdicts(study)[0]
    study.open_ends = [OpenEnd("code", "control", "rate", 1e-2, True, "extensions=9")]
    assert "Unsettled, at an end of its grid: control's rate." in study_verdicts(study)[0]


# ------------------------------------------------------------------------------------------ the plot


def test_a_curve_goes_from_the_start_over_alphas_to_the_end_as_validation_saw_them():
    study = findings(validation=BOTH)
    for outcome in study.outcomes:
        unit = outcome.unit
        if unit.arm == "part of control" and unit.setting == Setting(alpha=0.5):
            assert unit.seed == 0  # not chosen: it ran with the first seed only
            outcome.measured, outcome.general = measured(1.9, 0, noise=0), {"other": general(1.72, 0)}
    of_control, of_full = curves(study_numbers(study)["domains"]["code"], "other", 0)
    assert (of_control.arm, of_control.of) == ("part of control", "control")
    assert list(of_control.by_alpha) == [0, 0.5, 1]
    assert of_control.by_alpha[0] == (0, 0)
    assert of_control.by_alpha[0.5] == pytest.approx((0.02, -0.1), abs=0.01)
    assert of_control.by_alpha[1] == pytest.approx((0.04, -0.02), abs=0.01)  # its own run at alpha 1, not the control's
    assert list(of_full.by_alpha) == [0, 0.5, 1]
    assert of_full.by_alpha[0] == pytest.approx((-0.2, 0.4), abs=0.01)  # the base model
    assert of_full.by_alpha[1] == (0, 0)  # the fine-tune's own run


def test_a_study_without_a_general_text_has_no_such_plot(tmp_path):
    study = findings(arms={name: ARMS[name] for name in ("full fine-tune", "control")}, texts=())
    write_study_report(study, tmp_path)
    assert not (tmp_path / "forgetting.png").exists()


def test_rivals_over_codes_are_over_codes_and_a_control_is_of_the_same_modules():
    arms = {
        "full": make_arm("full", lrs=[1e-3]),
        "control": make_arm("control", lrs=[1e-3]),
        "NF4": make_arm("quantized", quantization="nf4"),
        "QLoRA": make_arm("lora", lrs=[1e-3], start="NF4"),
        "mask": make_arm("mask", lrs=[1e-3]),
        "mask on NF4": make_arm("mask", lrs=[1e-3], start="NF4"),
        "gates": make_arm("mask", lrs=[1e-3], target_modules=["gate_proj"]),
    }
    study = StudyConfig(arms=arms, domains={"code": DataConfig()})
    assert rivals_of(study, "mask") == ["full", "control"]
    assert rivals_of(study, "mask on NF4") == ["NF4", "QLoRA"]
    assert reference_of(study, "mask") == "control"
    assert reference_of(study, "gates") is None
