"""The site of make docs, as far as it can be tested without its builder: its contents, and how it is checked."""

import importlib.util
import re
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


@pytest.fixture
def tree(tmp_path, site):
    """Make a project: its first pages, docs/a.md, a source, a folder of two and a picture."""
    root = tmp_path / "project"
    files = {
        **dict.fromkeys(site.FIRST, "# Title\n"),
        "docs/a.md": "# A\n\n[source](../src/x.h) [list](../configs/) ![p](p.png) [dead](b.md#c) [far](https://x.y/z.py)\n",
        "docs/p.png": "picture",
        "src/x.h": "int x; // [no link](y.h)\n```\n",
        "src/y.h": "int y;\n",
        "configs/c.yaml": "c: 1\n",
        "configs/deep/d.json": "{}",
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


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


def test_what_make_docs_fetches_is_the_extra_docs():
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["docs"]
    recipe = re.search(r"^docs: dev .*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    assert f"pip install --quiet {' '.join(extra)}\n" in recipe


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


def test_sources_and_folders_become_pages_and_what_is_no_link_stays(tree, site, tmp_path):
    site.stage(tree, tmp_path / "staged")
    found = {path.relative_to(tmp_path / "staged").as_posix() for path in (tmp_path / "staged").rglob("*.*")}
    sources = {"src/x.h.md", "configs/README.md", "configs/c.yaml.md", "configs/deep/d.json"}
    assert found == {*site.FIRST, "docs/a.md", "docs/p.png", *sources}
    assert (tmp_path / "staged" / "docs" / "a.md").read_text().splitlines()[-1] == (
        "[source](../src/x.h.md) [list](../configs/README.md) ![p](p.png) [dead](b.md#c) [far](https://x.y/z.py)"
    )
    text = (tmp_path / "staged" / "src" / "x.h.md").read_text()
    assert text.endswith("---\n\n```` cpp\nint x; // [no link](y.h)\n```\n````\n")
    assert 'title: "src/x.h"\nsearch:\n  exclude: true\n' in text
    listed = (tmp_path / "staged" / "configs" / "README.md").read_text()
    assert listed.endswith("- [c.yaml](c.yaml.md)\n- [deep/d.json](deep/d.json)\n")


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


def test_code_stays_but_for_the_escape_of_a_cell(site, tree):
    block = "```python\nx = [y](src/x.h)\n```"
    assert site.rewritten(f"{block}\n[y](src/x.h#L1)\n{block}\n", tree) == f"{block}\n[y](src/x.h.md#L1)\n{block}\n"
    assert site.rewritten("| `a\\|b` \\| |\n`a\\|b`\n", tree) == "| `a|b` \\| |\n`a\\|b`\n"


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
