"""What a report says of bytes, from findings made by hand."""

from test_study_report import ARMS, findings

from mft.study.report.table import study_tables

SIZES = {"base": 0, "control": 200_000, "random mask": 4_000, "MFT": 9_000, "MFT x3": 200_000}


def with_bytes(sizes=SIZES, **options):
    """Findings whose runs take so many bytes, some more with each seed, and ten times as many where not chosen."""
    found = findings(**options)
    for one in found.outcomes:
        if one.unit.arm in sizes:
            chosen = one.unit.setting == found.chosen[one.unit.domain][one.unit.arm] and one.unit.part == 0
            one.bytes = sizes[one.unit.arm] * (1 if chosen else 10) + one.unit.seed
    return found


def test_a_row_has_the_mean_bytes_of_the_chosen_runs_and_where_they_began():
    table = study_tables(with_bytes())["code"]
    assert table.row("MFT").bytes == 9_001
    assert table.row("MFT x3").bytes == 200_001
    assert table.row("control x3").bytes is None
    assert {row.arm: row.start for row in table.rows} == dict.fromkeys(ARMS, "full fine-tune") | {
        "base": None,
        "full fine-tune": None,
    }
