"""The report about stored results: whether their code has changed since, and which command makes them again."""

import json
import subprocess

import pytest

from benchmarks import stored
from benchmarks.records import RESULTS


@pytest.fixture
def checkout(tmp_path):
    """Return a repository with one result of an existing file; commit(path, text) adds to it and returns the commit."""

    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.run(
            ["git", "-C", tmp_path, *identity, *arguments], capture_output=True, text=True, check=True
        )

    def commit(path, text):
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        git("add", "-A")
        git("commit", "-qm", path)
        return git("rev-parse", "HEAD").stdout.strip()

    git("init", "-q")
    return commit


def only(tmp_path):
    [found] = stored.read_stored(tmp_path / "results", tmp_path)
    return found


def keep(tmp_path, commit, name="compare-small.json"):
    record = {"environment": {"commit": commit, "command": "mft compare --config small"}}
    (tmp_path / "results").mkdir(exist_ok=True)
    (tmp_path / "results" / name).write_text(json.dumps(record))


def test_code_that_changed_is_counted_and_what_only_prints_is_not(checkout, tmp_path):
    first = checkout("python/mft_study/run.py", "1\n" * 20)
    keep(tmp_path, first[:7])
    assert (only(tmp_path).changed, only(tmp_path).words) == ([], "as it was")
    checkout("python/mft/cli/app.py", "2")
    checkout("python/mft_study/report/table.py", "2")
    checkout("docs/page.md", "2")
    assert only(tmp_path).changed == []
    checkout("python/mft_study/run.py", "3")
    checkout("csrc/cpu/kernel.cpp", "3")
    (tmp_path / "python/mft_study/plan.py").write_text("not committed")
    subprocess.run(["git", "-C", tmp_path, "add", "-N", "."], check=True)
    assert only(tmp_path).changed == ["csrc/cpu/kernel.cpp", "python/mft_study/plan.py", "python/mft_study/run.py"]
    assert only(tmp_path).words == "3 files changed"


def test_a_file_that_only_moved_has_not_changed(checkout, tmp_path):
    keep(tmp_path, checkout("python/mft_study/run.py", "1\n" * 20))
    (tmp_path / "python/mft_study/run.py").rename(tmp_path / "python/mft_study/moved.py")
    checkout("docs/page.md", "2")
    assert only(tmp_path).changed == []


@pytest.mark.parametrize("commit", ["", "0123456", "not-a-commit"])
def test_a_commit_that_is_not_there_is_not_called_unchanged(checkout, tmp_path, commit):
    checkout("docs/page.md", "1")
    keep(tmp_path, commit)
    assert only(tmp_path).changed is None
    assert "not known" in only(tmp_path).words


def test_every_stored_result_has_a_command(monkeypatch):
    records = {path.name: json.loads(path.read_text()) for path in RESULTS.glob("*.json")}
    measured = {name: record for name, record in records.items() if "environment" in record}
    assert len(measured) > 30
    assert all(stored.made_by(name, record)[0] for name, record in measured.items())
    monkeypatch.setattr("sys.argv", ["stored", "no-such"])
    with pytest.raises(SystemExit, match="names must be parts of names in .*, got no-such"):
        stored.main()
