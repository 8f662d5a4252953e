"""Compare the conclusions of stored studies with today's rules, and their intervals with the sums that they hold."""

import copy
import json

import pytest

from benchmarks import verdicts
from benchmarks.records import RESULTS
from mft_study.evidence.sums import read_sums
from mft_study.report.sums import recomputed
from mft_study.report.write import report_text

STUDIES = sorted([*RESULTS.glob("compare-*.json"), *RESULTS.glob("ablation-*.json")])
WITH_SUMS = [path for path in STUDIES if path.with_suffix(".npz").is_file()]


def named(paths):
    return [pytest.param(path, id=path.stem) for path in paths]


@pytest.mark.parametrize("path", named(STUDIES))
def test_a_stored_study_concludes_what_todays_rules_conclude(path):
    stored = json.loads(path.read_text())
    again, tables, changes = verdicts.judge_again(copy.deepcopy(stored))
    assert changes == []
    assert again == stored
    words = (again["verdicts"], again["remarks"], again["environment"])
    assert report_text(tables, *words) == path.with_suffix(".md").read_text()


@pytest.mark.parametrize("path", named(WITH_SUMS))
def test_a_stored_interval_is_the_one_of_its_sums(path):
    sums = read_sums(path.with_suffix(".npz"))
    for domain, table in json.loads(path.read_text())["domains"].items():
        row = next(row for row in table["rows"] if row["masked"])
        again = recomputed(sums, domain, row["arm"], table["full"])
        assert (again.estimate, again.low, again.high) == pytest.approx(
            tuple(row["minus_full"][name] for name in ("estimate", "low", "high")), rel=1e-6, abs=1e-9
        )
