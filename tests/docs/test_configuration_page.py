"""docs/reference/configuration.md is the page that today's keys give."""

import importlib.util
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def test_the_page_is_of_the_keys_of_now():
    spec = importlib.util.spec_from_file_location("configuration_page", DOCS / "configuration.py")
    page = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(page)
    text = (DOCS / "reference" / "configuration.md").read_text(encoding="utf-8")
    assert text == page.configuration(), "docs/reference/configuration.md is stale: make reference"
    assert "| `train.lr` | float above 0 | `0.001` | Learning rate. " in text
    assert "| `arms.NAME.kind` |" in text
