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


@pytest.mark.parametrize("change", ["an edit", "a new name", "a new file"])
def test_one_of_other_sources_is_refused(checkout, change):
    sources, report = checkout
    one = sources / "cpu" / "one.cpp"
    if change == "an edit":
        one.write_text("int one() { return 2; }\n")
    elif change == "a new name":
        one.rename(one.with_name("two.cpp"))
    else:
        (sources / "cpu" / "two.h").write_text("")
    with pytest.raises(
        RuntimeError, match="libmft_cpu.so must be built of csrc as it is to be measured, .* make install"
    ):
        check_built_of(sources, report)


def test_one_that_does_not_say_of_what_is_refused_too(checkout):
    sources, report = checkout
    report.write_text('{"cpu": {"built": true}}')
    with pytest.raises(RuntimeError, match="_build.json says nothing of its sources"):
        check_built_of(sources, report)


def test_without_sources_or_a_build_there_is_nothing_to_hold_against_it(checkout, tmp_path):
    sources, report = checkout
    check_built_of(tmp_path / "none", report)
    check_built_of(sources, tmp_path / "none.json")
