"""Tasks one after another: what each way of learning keeps, and a command that continues where it stopped."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from small_regime import counting, scratch

from benchmarks.regimes import sequential_tasks
from benchmarks.regimes.learners import AdaptersAdded, MasksUnited
from benchmarks.regimes.runs import RESULT, RUNS, TABLE, carry_out
from benchmarks.regimes.sequential_tasks import FORGOTTEN, NATS, REFERENCE, WAYS, SequentialTasks
from mft.config import TrainConfig


@pytest.fixture(scope="module")
def regime(tmp_path_factory):
    """Return a regime with every way of learning on two tasks."""
    directory = tmp_path_factory.mktemp("texts")
    return SequentialTasks(
        rates={arm: [1e-2] for arm in WAYS},
        seeds=[0, 1],
        scratch=scratch(directory),
        extensions=0,
        workers=1,
        tasks={"up": counting(directory, "a", 1), "by threes": counting(directory, "b", 3)},
        train=TrainConfig(epochs=1.0, batch_size=4, betas=(0, 0.99)),
    )


@pytest.fixture(scope="module")
def finished(regime, tmp_path_factory):
    directory, lines = tmp_path_factory.mktemp("out"), []
    return directory, carry_out(regime, directory, "test", lines.append), lines


@pytest.mark.slow
def test_power_is_said_before_the_first_run(finished):
    _, _, lines = finished
    said = [number for number, line in enumerate(lines) if "can show a difference of" in line]
    runs = [number for number, line in enumerate(lines) if "validation" in line]
    assert said
    assert said[0] < runs[0]


@pytest.mark.slow
def test_each_run_has_the_nats_of_each_document_before_and_after_each_task(finished):
    _, result, _ = finished
    assert {run["arm"] for run in result["runs"]} == set(WAYS)
    assert len(result["runs"]) == 2 * len(WAYS)
    for run in result["runs"]:
        stages = 2 if run["arm"] == "joint" else 3
        for task, nats in run[NATS].items():
            assert np.array(nats).shape == (stages, len(result["documents"]["tokens"][task]))
            assert nats[0] != nats[-1]
    assert next(run["order"] for run in result["runs"] if run["seed"] == 1) == ["by threes", "up"]


@pytest.mark.slow
def test_a_mask_per_task_forgets_nothing_and_is_compared_with_the_control(finished):
    _, result, _ = finished
    arm = result["arms"]["a mask per task"]
    assert arm[FORGOTTEN] == 0
    difference = arm[f"{FORGOTTEN} - {REFERENCE}"]
    assert difference["estimate"] == pytest.approx(-result["arms"][REFERENCE][FORGOTTEN], abs=1e-4)


@pytest.mark.slow
def test_a_finished_regime_runs_nothing_again_and_gives_the_same_result(finished, regime):
    directory, result, _ = finished
    lines = []
    again = carry_out(regime, directory, "test", lines.append)
    assert not [line for line in lines if "validation" in line]
    assert again["arms"] == result["arms"]
    assert json.loads((directory / RESULT).read_text())["arms"] == json.loads(json.dumps(result["arms"]))
    assert "mask trained on" in (directory / TABLE).read_text()


@pytest.mark.slow
def test_another_regime_in_the_same_directory_is_refused(finished, regime):
    directory, _, _ = finished
    with pytest.raises(ValueError, match="regime.json must be what runs.*--out"):
        carry_out(dataclasses.replace(regime, seeds=[0, 1, 2]), directory, "test", lambda line: None)


@pytest.mark.slow
def test_a_run_that_diverges_is_a_note_and_not_the_end(regime, tmp_path):
    rates = {REFERENCE: [1e-2, 1e20], "LoRA merged": [1e-2, 2e-2]}
    result = carry_out(dataclasses.replace(regime, rates=rates, seeds=[0]), tmp_path, "test", lambda line: None)
    assert result["arms"][REFERENCE]["lr"] == 1e-2
    assert [run["lr"] for run in result["runs"] if "diverged" in run] == [1e20]
    assert len(list((tmp_path / RUNS).iterdir())) == 4


@pytest.mark.parametrize(
    ("united", "expected"), [(MasksUnited, [0.0, 2.0, 0.0, 4.0]), (AdaptersAdded, [0.0, 2.0, -3.0, 4.0])]
)
def test_what_was_learned_apart_is_united(united, expected):
    start = torch.tensor([1.0, 2.0, 3.0, 4.0])
    ends = [torch.tensor([0.0, 2.0, 0.0, 4.0]), torch.tensor([1.0, 2.0, 0.0, 4.0])]
    assert united.unite(start, ends).tolist() == expected


def test_the_texts_of_installed_packages_are_written_once(tmp_path, monkeypatch):
    monkeypatch.setattr(sequential_tasks, "sources_of", lambda package: {f"{i}.py": f"{package} {i}" for i in range(9)})
    monkeypatch.setattr(sequential_tasks, "docstrings_of", lambda package: {"a.py:1": "text " * 3000})
    tasks = sequential_tasks.default_tasks(tmp_path, 512, 256)
    assert list(tasks) == ["headers", "problems", "docstrings", "sympy", "transformers"]
    assert len(json.loads((tmp_path / "docstrings.jsonl").read_text())["text"]) == 8000
    written = (tmp_path / "sympy.jsonl").stat().st_mtime_ns
    sequential_tasks.default_tasks(tmp_path, 512, 256)
    assert (tmp_path / "sympy.jsonl").stat().st_mtime_ns == written
