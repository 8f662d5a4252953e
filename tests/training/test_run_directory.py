"""A run's directory: what counts as a run, and its metrics while they are being written."""

import pytest

from mft.tracking.metrics import MetricsFile, read_metrics
from mft.training.checkpoint import write_checkpoint
from mft.training.run_directory import check_run_directory, holding


def test_a_line_that_is_being_written_is_not_an_event_yet(tmp_path):
    path = tmp_path / "metrics.jsonl"
    metrics = MetricsFile(path)
    metrics.write(phase="a", loss=1.5)
    with path.open("a") as file:
        file.write('{"phase": "b", "lo')
    assert read_metrics(path) == [{"phase": "a", "loss": 1.5}] == metrics.events
    with path.open("a") as file:
        file.write("\n")
    with pytest.raises(ValueError, match=r'metrics.jsonl:2: expected an event .*, got \'{"phase": "b", "lo\''):
        read_metrics(path)
    path.write_text("[" * 100_000 + "\n")
    with pytest.raises(ValueError, match=r"metrics.jsonl:1: expected an event"):
        read_metrics(path)


def test_metrics_that_go_on_hold_the_events_given_and_no_others(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    MetricsFile(path, [{"step": 1}]).write(step=2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_scratch_of_a_killed_run_is_no_run_and_is_swept(tmp_path):
    scratch = tmp_path / ".masks.12345678.tmp"
    scratch.mkdir()
    check_run_directory(tmp_path)
    with holding(tmp_path):
        assert not scratch.exists()


def test_checkpoints_beside_a_result_go_if_they_are_ours(tmp_path):
    root = tmp_path / "checkpoints"
    write_checkpoint(root, 3, {}, {})
    with holding(tmp_path):
        assert root.exists()
    (tmp_path / "model").mkdir()
    with holding(tmp_path):
        assert not root.exists()
    (root / "step-00000010").mkdir(parents=True)  # another program's directory
    with holding(tmp_path):
        assert root.exists()


def test_a_directory_made_for_a_run_that_fails_goes_again(tmp_path):
    def failing():
        with holding(tmp_path / "a" / "b"):
            raise ValueError("no such model")

    with pytest.raises(ValueError, match="no such model"):
        failing()
    assert not (tmp_path / "a").exists()
