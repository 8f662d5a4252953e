"""Each refused input gets a message with all its parts, each odd one its result, and the site's page shows both."""

from pathlib import Path
from types import ModuleType

import pytest
from bad_inputs.registry import ACCEPTED, REFUSED, read_table, running, told
from bad_inputs.report import report
from dead_links import dead_links

DOCS = Path(__file__).parents[2] / "docs" / "reference"


def listed(cases):
    return [pytest.param(case, id=f"{case.group}-{case.title.replace(' ', '-')}") for case in cases]


@pytest.mark.parametrize("case", listed(REFUSED))
def test_a_bad_input_is_told_what_where_got_expected_and_remedy(case):
    said = told(case)
    assert said.error is case.error
    assert case.lacks(said.message) == [], said.message
    assert "\n" not in said.shown


@pytest.mark.parametrize("case", listed(ACCEPTED))
def test_an_odd_input_is_accepted(case):
    with running(case) as (run, _):
        run()


@pytest.mark.parametrize(
    "rest", ["    f()", "    -> ValueError: x | must be y | z", "    f()\n    -> ValueError: x | y"]
)
def test_a_row_without_its_parts_is_an_error(rest):
    module = ModuleType("group")
    module.TABLE = f"a title\n{rest}\n"
    with pytest.raises(ValueError, match="group, a title: must end in"):
        list(read_table(module))


def test_the_page_shows_each_case_and_its_links_lead_somewhere():
    page = report()
    assert [case.title for case in REFUSED if f"\n{told(case).error.__name__}: {told(case).shown}\n" not in page] == []
    assert [case.title for case in ACCEPTED if f"| {case.title} | {case.happens} |" not in page] == []
    assert list(dead_links(page, DOCS)) == []
