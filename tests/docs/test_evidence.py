"""Compare the pages that judge masks with the stored reports: intervals, p-values, tables, steps and seconds."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
OVERVIEW = ROOT / "docs" / "explanation" / "evidence.md"
STUDIES = sorted((ROOT / "docs" / "explanation" / "evidence").glob("*.md"))
JUDGING = ["README.md", "docs/how-to/recipe.md", "docs/explanation/evidence.md", "docs/how-to/experts.md"]
INTERVAL = re.compile(r"[+-]\d+\.\d+ \[[+-]\d+\.\d+, [+-]\d+\.\d+\]")
P_VALUE = re.compile(rf"({INTERVAL.pattern})[^.;:|\[]{{0,20}}\bp (<? ?0\.\d+)")
REBUILD = "+0.0026 [-0.0040, +0.0094]"  # of a study that is not stored, as the page says
STEPS = re.compile(r"control (\d+) in ([\d.]+) s; mask (\d+) in ([\d.]+) s")
NOT_STORED = {("mask-settings", 0), ("budget", 1)}
SEVERAL_ARMS = {"keep-ratio", "layers", "amount-of-data"}  # pages whose tables have several arms in a row


def cells(line):
    return [cell.strip(" *") for cell in line.strip().strip("|").split("|")]


def plain(text):
    """Return the text in one line, because an interval may continue on the next line, and without bold type."""
    return " ".join(text.replace("*", "").split())


@pytest.fixture(scope="module")
def reports():
    return "".join(path.read_text() for path in sorted(RESULTS.glob("*.md")))


@pytest.fixture(scope="module")
def stored(reports):
    """Return the cells of each row in a stored report."""
    return [set(cells(line)) for line in reports.splitlines() if line.startswith("|")]


def tables(page):
    """Return the tables in a page's result, each as the cells of its rows without the head."""
    section = page.read_text().split("\n## Result\n")[1].split("\n## ")[0]
    found = re.findall(r"^\|.*\n\|[-:|]+\|\n((?:\|.*\n)+)", section, re.MULTILINE)
    return [[cells(line) for line in rows.splitlines()] for rows in found]


@pytest.mark.parametrize("page", [*JUDGING, *(path.relative_to(ROOT).as_posix() for path in STUDIES)])
def test_each_interval_that_judges_masks_stands_in_a_stored_table(page, reports):
    said = plain((ROOT / page).read_text())
    assert [found for found in INTERVAL.findall(said) if found not in reports + REBUILD] == []


@pytest.mark.parametrize("page", STUDIES, ids=lambda page: page.stem)
def test_the_p_of_an_interval_is_the_stored_one(page, reports):
    for interval, p in P_VALUE.findall(plain(page.read_text())):
        unit = r"(?: nats per token,| % of questions answered exactly,)?"
        behind = re.escape(interval) + unit + r" (?:Holm-adjusted p|\|) "
        assert re.search(rf"{behind}{p.replace(' ', '')}(?![\d.])", plain(reports)), (interval, p)


def test_each_effect_of_the_overview_is_that_of_the_study_it_links_to():
    rows = [line for line in OVERVIEW.read_text().splitlines() if "](evidence/" in line and INTERVAL.search(line)]
    assert len(rows) >= 15
    for row in rows:
        linked = re.findall(r"\]\((evidence/[^)]+)\)", row)
        studies = "".join(plain((OVERVIEW.parent / link).read_text()) for link in linked)
        assert INTERVAL.search(row)[0] in studies, row


@pytest.mark.parametrize("page", STUDIES, ids=lambda page: page.stem)
def test_the_figures_of_a_row_stand_in_one_stored_row(page, stored):
    for number, table in enumerate(tables(page)):
        for name, *row in table if (page.stem, number) not in NOT_STORED else ():
            figures = [figure.replace("*", "").removesuffix(" %") for figure in row if figure]
            if page.stem in SEVERAL_ARMS:
                parts = [part for figure in figures for part in figure.split(" / ")]
                lacks = [part for part in parts if not any(cell.startswith(part) for own in stored for cell in own)]
                assert lacks == [], name
            else:
                assert any(own.issuperset(figures) for own in stored), (name, figures)


@pytest.mark.parametrize("page", STUDIES, ids=lambda page: page.stem)
def test_steps_and_seconds_are_those_of_a_stored_row(page, stored):
    for control, its_seconds, mask, seconds in STEPS.findall(plain(page.read_text())):
        for steps, said in ((control, its_seconds), (mask, seconds)):
            digits = len(said.partition(".")[2])
            times = [cell for own in stored if steps in own for cell in own if re.fullmatch(r"\d+\.?\d*", cell)]
            assert any(f"{float(time):.{digits}f}" == said for time in times), (steps, said)
