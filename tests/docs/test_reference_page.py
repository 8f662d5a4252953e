"""The page that docs/reference.py makes from docstrings: every public name, and links that lead somewhere."""

import importlib.util
from pathlib import Path

import pytest
from dead_links import dead_links

import mft

pytest.importorskip("griffe", reason="needs griffelib, of the dev extra")
DOCS = Path(__file__).parents[2] / "docs" / "reference"


@pytest.fixture(scope="module")
def page():
    """Return the module docs/reference.py."""
    spec = importlib.util.spec_from_file_location("reference_page", DOCS.with_suffix(".py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_every_public_name_has_a_section_and_links_lead_somewhere(page):
    text = page.reference()
    for objects in page.public_objects().values():
        assert [name for name in objects if f"\n### {name}\n\n```python\n" not in text] == []
    assert list(dead_links(text, DOCS)) == []


def test_every_public_name_has_a_docstring(page):
    public = page.public_objects()
    assert set(public["mft"]) == set(mft.__all__)
    bare = [name for objects in public.values() for name, said in objects.items() if not page.text_of(said)]
    assert bare == []


def test_a_public_name_that_the_sources_do_not_import_is_named(page, monkeypatch):
    monkeypatch.setattr(mft, "__all__", [*mft.__all__, "mask_modle"])
    with pytest.raises(ValueError, match="python/mft/__init__.py must import mask_modle"):
        page.public_objects()
