"""Each stored result has a command that makes it again."""

import json

import pytest

from benchmarks import stored
from benchmarks.records import RESULTS


def test_every_stored_result_has_a_command(monkeypatch):
    records = {path.name: json.loads(path.read_text()) for path in RESULTS.glob("*.json")}
    measured = {name: record for name, record in records.items() if "environment" in record}
    assert len(measured) > 30
    assert all(stored.find_maker(name, record)[0] for name, record in measured.items())
    monkeypatch.setattr("sys.argv", ["stored", "no-such"])
    with pytest.raises(SystemExit, match="names must be parts of names in .*, got no-such"):
        stored.main()
