"""A report's sentences about bytes, from hand-made findings: rows, masks at equal bytes, the frontier."""

import json

import pytest
from test_study_report import ARMS, LOSSES, findings

from mft_study.arms.kinds import make_arm
from mft_study.report.at_equal_bytes import ABOUT, NO_MORE, byte_verdicts, compare_at_equal_bytes, remark_on_bytes
from mft_study.report.pictures.by_bytes import Point, frontier
from mft_study.report.table import study_tables
from mft_study.report.write import write_study_report

RATES = {"lrs": [1e-4, 3e-4, 1e-3, 3e-3, 1e-2]}
SIZES = {"base": 0, "control": 200_000, "random mask": 4_000, "MFT": 9_000, "MFT x3": 200_000}
BY_BYTES = {
    **{name: ARMS[name] for name in ("base", "full fine-tune", "control", "MFT")},
    "LoRA 1": make_arm("lora", **RATES),
    "LoRA 8": make_arm("lora", **RATES),
    "temperature": make_arm("temperature"),
    "part of MFT": make_arm("interpolated", of="MFT", alphas=[0.5]),
    "LoRA on control": make_arm("lora", start="control", **RATES),
    "magnitude mask": make_arm("magnitude"),
}
RIVALS = {"LoRA 1": 8_000, "LoRA 8": 64_000, "temperature": 2, "part of MFT": 8_500, "LoRA on control": 1_000}
RIVALS |= {"magnitude mask": 5_000}
LOSS = {name: LOSSES[name] for name in ("base", "full fine-tune", "control", "MFT")}
LOSS |= {"LoRA 1": 1.98, "LoRA 8": 1.90, "temperature": 1.99, "part of MFT": 1.90, "LoRA on control": 1.90}
LOSS |= {"magnitude mask": 1.90}


def with_bytes(sizes=SIZES, **options):
    """Return findings whose chosen runs store ``sizes`` bytes, plus the seed; other runs store ten times as many."""
    found = findings(**options)
    for one in found.outcomes:
        if one.unit.arm in sizes:
            chosen = one.unit.setting == found.chosen[one.unit.domain][one.unit.arm] and one.unit.part == 0
            one.bytes = sizes[one.unit.arm] * (1 if chosen else 10) + one.unit.seed
    return found


def by_bytes(arms=BY_BYTES, sizes=SIZES | RIVALS, losses=LOSS, **options):
    options = {"arms": arms, "test": losses, "validation": losses} | options
    study = with_bytes(sizes=sizes, **options)
    return study, compare_at_equal_bytes(study, study_tables(study))


def test_a_row_has_the_mean_bytes_of_the_chosen_runs():
    table = study_tables(with_bytes())["code"]
    assert table.row("MFT").bytes == 9_001
    assert table.row("MFT x3").bytes == 200_001
    assert table.row("control x3").bytes is None


def test_a_masks_rival_is_the_best_on_validation_that_stores_no_more_from_the_same_start():
    _, (one,) = by_bytes()
    assert (one.mask, one.bytes, one.rival, one.rival_bytes, one.rivals) == ("MFT", 9_001, "LoRA 1", 8_001, 2)
    assert one.difference.estimate == pytest.approx(-0.03, abs=0.002)
    assert one.validation == pytest.approx(-0.03, abs=0.002)
    _, (one,) = by_bytes(sizes=SIZES | RIVALS | {"MFT": 64_000})
    assert (one.rival, one.rivals) == ("LoRA 8", 3)  # equally many bytes are not more
    _, (one, _) = by_bytes(sizes=SIZES | RIVALS | {"MFT": 63_999})
    assert one.rival == "LoRA 1"
    _, (one, _) = by_bytes(validation=LOSS | {"temperature": 1.97})
    assert one.rival == "temperature"  # whatever the test split says


@pytest.mark.parametrize(
    ("bytes_of_mft", "expected"),
    [
        (6_402, [("temperature", NO_MORE), ("LoRA 1", ABOUT)]),  # its size is 1.25 times the mask's
        (6_399, [("temperature", NO_MORE), (None, ABOUT)]),
        (9_000, [("LoRA 1", NO_MORE)]),  # it is the best by both rules
        (63_999, [("LoRA 1", NO_MORE), ("LoRA 8", ABOUT)]),
        (20_000, [("LoRA 1", NO_MORE), (None, ABOUT)]),  # LoRA 1 stores 40 % of the mask's bytes
    ],
)
def test_a_mask_meets_what_stores_about_as_much_too(bytes_of_mft, expected):
    _, found = by_bytes(sizes=SIZES | RIVALS | {"MFT": bytes_of_mft - 1})
    assert [(one.rival, one.stores) for one in found] == expected
    compared = [one for one in found if one.rival is not None]
    assert all(one.difference.p_holm <= len(compared) * one.difference.p for one in compared)
    (said,) = byte_verdicts(found)
    assert ("has no rival that stores about as much." in said) == ((None, ABOUT) in expected)
    if bytes_of_mft == 20_000:
        assert "LoRA 1 (8,001 bytes, 40 % of its own, the best on validation of 2 that store no more)" in said
    if bytes_of_mft == 63_999:
        assert "LoRA 8 (64,001 bytes, 100 % of its own, the only one to store about as much)" in said
        assert "and among those that store about as much, within a factor of 1.25," in remark_on_bytes(found)[0]


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({}, ("ahead", "")),
        ({"losses": LOSS | {"LoRA 1": 1.92}}, ("behind", "")),
        ({"losses": LOSS | {"LoRA 1": 1.9505}, "noise": 0.03}, ("undecided", "the interval includes 0")),
        ({"validation": LOSS | {"MFT": 1.985}}, ("undecided", "validation disagrees")),
        ({"documents": 1}, ("undecided", "1 test document, at least 20 are needed")),
    ],
)
def test_ahead_and_behind_are_said_by_the_rules_of_the_verdict(changes, verdict):
    _, (one,) = by_bytes(**changes)
    assert one.verdict == verdict


def test_holm_counts_the_masks_that_have_a_rival_in_all_domains():
    arms = BY_BYTES | {"MFT 2": ARMS["MFT"], "MFT small": ARMS["MFT"]}
    losses = LOSS | {"MFT": 1.976, "MFT 2": 1.976, "MFT small": 1.9}
    sizes = SIZES | RIVALS | {"MFT 2": 9_000, "MFT small": 1}
    _, found = by_bytes(arms, sizes, losses, domains=("code", "text"), noise=0.02)
    first, _, small = found[:3]
    assert len(found) == 6
    assert first.difference.p_holm == pytest.approx(min(1, 4 * first.difference.p))  # the least of four equal p-values
    assert (small.rival, small.rivals, small.difference) == (None, 0, None)
    texts = byte_verdicts(found)
    assert [text.split(". ")[0] for text in texts] == ["code, at equal bytes", "text, at equal bytes"]
    assert "MFT small (2 bytes) has no rival that stores so little." in texts[0]
    assert "over these 4 comparisons" in remark_on_bytes(found)[0]


def test_where_no_mask_has_a_rival_nothing_is_said():
    _, found = by_bytes(sizes={"MFT": 1, "LoRA 1": 8_000})
    assert found == byte_verdicts(found) == remark_on_bytes(found) == []
    study = findings()  # from an older version: no bytes at all
    assert compare_at_equal_bytes(study, study_tables(study)) == []


def test_the_report_holds_the_sentence_the_numbers_and_the_picture(tmp_path):
    study, (one,) = by_bytes(documents=1)
    write_study_report(study, tmp_path)
    text = (tmp_path / "table.md").read_text()
    assert "MFT (9,001 bytes) is neither shown ahead of nor behind LoRA 1 (8,001 bytes, 89 % of its own" in text
    assert "over these 1 comparisons" in text
    numbers = json.loads((tmp_path / "table.json").read_text(), parse_constant=pytest.fail)
    (entry,) = numbers["at_equal_bytes"]
    assert (entry["rival"], entry["verdict"], entry["difference"]["low"]) == ("LoRA 1", "undecided", None)
    assert entry["difference"]["estimate"] == one.difference.estimate
    assert (tmp_path / "bytes.png").read_bytes().startswith(b"\x89PNG")


def test_the_frontier_is_what_no_arm_of_as_few_bytes_reaches():
    at = [Point(name, "lora", size, loss, loss, loss) for name, size, loss in (
        ("worse than the start", 1, 0.1), ("a", 2, -0.1), ("b", 3, -0.05), ("c", 4, -0.1), ("d", 5, -0.2)
    )]  # fmt: skip
    assert [point.arm for point in frontier(at)] == ["a", "d"]
