"""The page that docs/reference.py makes from docstrings: every public name, and links that lead somewhere."""

import importlib.util
from pathlib import Path

import pytest
from dead_links import dead_links

import mft

pytest.importorskip("griffe", reason="needs griffelib, of the dev extra")
DOCS = Path(__file__).parents[2] / "docs" / "reference"
DOCSTRING = """scores -= lr * step(scores), see masked_linear and ``a * b``.

Of its own line:

    with f(x):
        g()

Args:
    x: (K,), as of
        mask_model.
    y, z: others.
More of all.
Returns: {"a": 1,
"b": 2}.
Raises:
    ValueError if x is empty.
"""


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


def test_sections_become_lists_and_what_is_not_markup_stays_text(page):
    assert page.documentation(DOCSTRING, {"masked_linear", "mask_model"}) == (
        "scores -= lr \\* step(scores), see [masked_linear](#masked_linear) and `a * b`.\n\nOf its own line:\n\n"
        "```python\nwith f(x):\n    g()\n```\n\n"
        "**Args**\n\n- `x`: (K,), as of\n  [mask_model](#mask_model).\n- `y`, `z`: others.\n\nMore of all.\n\n"
        '**Returns**: {"a": 1,\n"b": 2}.\n\n**Raises**: ValueError if x is empty.\n'
    )
