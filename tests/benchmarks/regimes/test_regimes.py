"""Each regime is carried out on a tiny model: what its result holds, and a command that continues where it stopped."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from small_regime import counting, scratch

from benchmarks.regimes import federated, sequential_tasks
from benchmarks.regimes.federated import BITS, BOUND, CURVE, UP, Federated
from benchmarks.regimes.learners import AdaptersAdded, MasksUnited
from benchmarks.regimes.runs import RESULT, RUNS, TABLE, carry_out
from benchmarks.regimes.sequential_tasks import FORGOTTEN, NATS, REFERENCE, SequentialTasks
from mft.config import TrainConfig


def small(kind, arms, directory, **own):
    """Return a regime with two seeds, one rate for each arm, and the texts of ``own`` as it names them."""
    shared = {"seeds": [0, 1], "scratch": scratch(directory), "extensions": 0, "workers": 1}
    return kind(rates={arm: [1e-2] for arm in arms}, **shared, **own)


def tasks(directory):
    texts = {"up": counting(directory, "a", 1), "by threes": counting(directory, "b", 3)}
    train = TrainConfig(epochs=1.0, batch_size=4, betas=(0, 0.99))
    return small(SequentialTasks, sequential_tasks.WAYS, directory, tasks=texts, train=train)


def clients(directory, arms=federated.WAYS):
    texts = {name: counting(directory, name, step) for step, name in enumerate("abc", start=1)}
    local = TrainConfig(steps=1, batch_size=4, schedule="constant", warmup_ratio=0.0, betas=(0, 0.99))
    return small(Federated, arms, directory, clients=texts, rounds=2, looks=2, local=local)


def carried_out(make, factory):
    regime, out = make(factory.mktemp("texts")), factory.mktemp("out")
    return regime, out, carry_out(regime, out, "test")


@pytest.fixture(scope="module")
def of_tasks(tmp_path_factory):
    return carried_out(tasks, tmp_path_factory)


@pytest.fixture(scope="module")
def of_clients(tmp_path_factory):
    return carried_out(clients, tmp_path_factory)[2]


# ---------------------------------------------------------------------------------------------- tasks one after another


@pytest.mark.slow
def test_each_run_has_the_nats_of_each_document_before_and_after_each_task(of_tasks):
    _, _, result = of_tasks
    assert {run["arm"] for run in result["runs"]} == set(sequential_tasks.WAYS)
    for run in result["runs"]:
        stages = 2 if run["arm"] == "joint" else 3
        for task, nats in run[NATS].items():
            assert np.array(nats).shape == (stages, len(result["documents"]["tokens"][task]))
            assert nats[0] != nats[-1]
    assert next(run["order"] for run in result["runs"] if run["seed"] == 1) == ["by threes", "up"]
    assert result["arms"]["a mask per task"][FORGOTTEN] == 0


@pytest.mark.slow
def test_a_finished_regime_runs_nothing_again_and_another_in_its_directory_is_refused(of_tasks, capsys):
    regime, directory, result = of_tasks
    again = carry_out(regime, directory, "test")
    assert "validation" not in capsys.readouterr().out
    assert again["arms"] == result["arms"]
    assert json.loads((directory / RESULT).read_text())["arms"] == json.loads(json.dumps(result["arms"]))
    assert "mask trained on" in (directory / TABLE).read_text()
    with pytest.raises(ValueError, match="regime.json must be what runs.*--out"):
        carry_out(dataclasses.replace(regime, seeds=[0, 1, 2]), directory, "test")


@pytest.mark.slow
def test_a_run_that_diverges_is_a_note_and_not_the_end(of_tasks, tmp_path):
    rates = {REFERENCE: [1e-2, 1e20], "LoRA merged": [1e-2, 2e-2]}
    regime = dataclasses.replace(of_tasks[0], rates=rates, seeds=[0])
    result = carry_out(regime, tmp_path, "test")
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


# ---------------------------------------------------------------------------------------------- clients


@pytest.mark.slow
def test_every_way_but_the_bounds_sends_at_most_a_bit_per_weight(of_clients):
    heads = 8 * 5 * 14 / (2 * (4 * 16 * 16 + 3 * 16 * 32))  # 5 bytes for each of the 14 small matrices
    for arm, found in of_clients["arms"].items():
        if not arm.startswith(BOUND):
            assert 0 < found[f"most {BITS}"] <= (1 if "LoRA" not in arm else 1.5) + heads
    assert of_clients["arms"][BOUND][BITS] == 32
    for run in of_clients["runs"]:
        assert np.array(run[UP]).shape == (2, 3)
        assert [rounds for rounds, _ in run[CURVE]] == [1, 2]


@pytest.mark.slow
@pytest.mark.parametrize("arm", federated.WAYS)
def test_rounds_bring_the_clients_text_nearer(arm, tmp_path):
    """The rate suits a model that was trained for two steps; the first evaluation is after one round."""
    regime = clients(tmp_path, [arm])
    local = dataclasses.replace(regime.local, steps=3)
    longer = dataclasses.replace(regime, rates={arm: [2e-2]}, seeds=[0], rounds=6, local=local)
    curve = carry_out(longer, tmp_path / "out", "test")["arms"][arm][CURVE]
    assert curve[-1][1] < curve[0][1]
