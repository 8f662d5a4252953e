"""Nothing is measured with a library that was built from sources other than those of the recorded commit."""

import json

import pytest

from benchmarks.harness import check_built_of
from building.sources import digest


@pytest.fixture
def checkout(tmp_path):
    sources, report = tmp_path / "csrc", tmp_path / "_build.json"
    (sources / "cpu").mkdir(parents=True)
    (sources / "cpu" / "one.cpp").write_text("int one() { return 1; }\n")
    report.write_text(json.dumps({"cpu": {"built": True, "sources": digest(sources)}}))
    return sources, report


def test_a_library_of_these_sources_is_measured(checkout):
    check_built_of(*checkout)


CHANGES = {
    "edited": lambda sources, _: (sources / "cpu" / "one.cpp").write_text("int one() { return 2; }\n"),
    "renamed": lambda sources, _: (sources / "cpu" / "one.cpp").rename(sources / "cpu" / "two.cpp"),
    "added": lambda sources, _: (sources / "cpu" / "two.h").write_text(""),
    "untold": lambda _, report: report.write_text('{"cpu": {"built": true}}'),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_one_of_other_or_unknown_sources_is_refused(checkout, change):
    change(*checkout)
    with pytest.raises(RuntimeError, match="must be built of csrc as it is to be measured|says nothing of its sources"):
        check_built_of(*checkout)


def test_without_sources_or_a_build_there_is_nothing_to_hold_against_it(checkout, tmp_path):
    sources, report = checkout
    check_built_of(tmp_path / "none", report)
    check_built_of(sources, tmp_path / "none.json")
