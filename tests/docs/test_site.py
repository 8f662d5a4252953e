"""The site of make docs, as far as it can be tested without its builder: its contents, and how it is checked."""

import importlib.util
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CONFIG = tomllib.loads((ROOT / "docs" / "zensical.toml").read_text())["project"]


@pytest.fixture(scope="module")
def site():
    """Return the module docs/build_site.py."""
    spec = importlib.util.spec_from_file_location("build_site", ROOT / "docs" / "build_site.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pages_of(nav):
    for entry in nav:
        value = entry if isinstance(entry, str) else next(iter(entry.values()))
        yield from [value] if isinstance(value, str) else pages_of(value)


def test_every_page_is_in_the_navigation_once(site):
    folders = (ROOT / "docs", ROOT / "benchmarks" / "results")
    pages = [page.relative_to(ROOT).as_posix() for folder in folders for page in folder.rglob("*.md")]
    written = [f"docs/reference/{name}" for name in site.WRITTEN]
    assert sorted(pages_of(CONFIG["nav"])) == sorted([*site.FIRST, *pages, *written]), (
        "nav in docs/zensical.toml has each page once"
    )


def test_every_link_of_the_pages_leads_into_the_staged_tree(site, tmp_path):
    site.stage(ROOT, tmp_path)
    written = {
        f"docs/reference/{name}" for name in site.WRITTEN
    }  # test_reference_page.py and others check the links of these
    for name in set(pages_of(CONFIG["nav"])) - written:
        links = [
            link for part in site.FENCED.split((tmp_path / name).read_text())[::2] for link in site.LINK.findall(part)
        ]
        dead = [link for link in links if "://" not in link and not (tmp_path / name).parent.joinpath(link).is_file()]
        assert dead == [], name


def test_pages_that_commands_write_are_staged_beside_those_of_docs(site, tmp_path):
    pages, staged = tmp_path / "pages", tmp_path / "staged"
    pages.mkdir()
    staged.mkdir()
    for name in site.WRITTEN[1:]:
        (pages / name).write_text("[concepts](concepts.md#masks) [source](../../setup.py)\n")
    with pytest.raises(SystemExit, match=f"{site.WRITTEN[0]} must be written before .*: make docs does both"):
        site.stage_written(pages, staged)
    (pages / site.WRITTEN[0]).write_text("# First\n")
    site.stage_written(pages, staged)
    assert sorted(path.name for path in staged.iterdir()) == sorted(site.WRITTEN)
    linked = (staged / site.WRITTEN[1]).read_text()
    assert linked == "[concepts](concepts.md#masks) [source](../../setup.py.md)\n"


def test_a_built_site_is_checked_for_dead_links_and_what_it_loads(site, tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "index.html").write_text('<h1 id="here">B</h1>')
    (tmp_path / "a.html").write_text(
        '<p id="top"><a href="b/index.html#here"><a href="b"><a href="#top"><a href="https://x.y/"><a href="?q=1">'
        '<a href="b/index.html#gone"><a href="c.html"><img src="d.png"><script src="https://x.y/e.js"></script>'
        '<link rel="stylesheet" href="//x.y/f.css">'
    )
    (tmp_path / "g.css").write_text("@font-face { src: url('https://x.y/g.woff') } a { background: url(data:image) }")
    assert list(site.check(tmp_path)) == [
        "a.html: dead anchor b/index.html#gone",
        "a.html: dead link c.html",
        "a.html: dead link d.png",
        "a.html: a page must load nothing from elsewhere, got <script> https://x.y/e.js",
        "a.html: a page must load nothing from elsewhere, got <link> //x.y/f.css",
        "g.css: loads https://x.y/g.woff'",
    ]
