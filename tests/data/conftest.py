"""Fixtures that the tests of data share."""

import json

import pytest


@pytest.fixture
def own_cache(tmp_path_factory, monkeypatch, request):
    """Give each test a cache of its own, so that it reads no rows of another run; the model's cache stays."""
    if "tokenizer" in request.fixturenames:
        request.getfixturevalue("tokenizer")
    monkeypatch.setenv("MFT_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def write(tmp_path):
    """Write rows as JSON lines and return the file's name."""

    def write(rows, name="data.jsonl"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write
