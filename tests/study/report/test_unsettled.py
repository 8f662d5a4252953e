"""Verdicts of dominance that depend on a choice at an end of its grid."""

from test_dominance import findings

from mft_study.grid import OpenEnd
from mft_study.report.verdict import study_verdicts


def test_a_verdict_of_dominance_that_rests_on_an_end_of_a_grid_is_marked():
    study = findings()
    assert "Unsettled" not in study_verdicts(study)[0]
    study.open_ends = [OpenEnd("code", "control", "rate", 1e-2, True, "extensions=9")]
    assert "Unsettled, at an end of its grid: control's rate." in study_verdicts(study)[0]
