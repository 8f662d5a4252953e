"""The files that a public project has besides its code agree with the code."""

import re
import tomllib
from pathlib import Path

import yaml

import mft

ROOT = Path(__file__).parents[2]


def test_the_license_is_the_one_that_the_metadata_names():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["license"] == "Apache-2.0"
    text = (ROOT / project["license-files"][0]).read_text()
    assert "Apache License" in text[:200]
    assert "END OF TERMS AND CONDITIONS" in text


def test_every_paper_that_is_to_be_cited_stands_among_the_papers_of_the_concepts():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["license"] == "Apache-2.0"
    assert citation["title"].startswith("mft_kernels")
    assert len(citation["references"]) == 3
    concepts = (ROOT / "docs" / "explanation" / "concepts.md").read_text()
    for paper in citation["references"]:
        line = next(line for line in concepts.splitlines() if f"*{paper['title']}*" in line)
        assert paper["url"].removeprefix("https://arxiv.org/abs/") in line
        assert [author["family-names"] for author in paper["authors"]] == re.findall(
            r"[A-Z]\. (?:[A-Z]\. )?([A-Z]\w+)", line.split(f": *{paper['title']}*")[0]
        )


def test_the_changelog_has_the_version_that_the_packages_name():
    headings = re.findall(r"^## \[(.+)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[:2] == ["Unreleased", mft.__version__]
    assert "0.1.0" in headings
