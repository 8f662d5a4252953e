"""The regime is carried out on a tiny model: what its result holds, and a command that continues where it stopped."""

import dataclasses
import json

import numpy as np
import pytest
from small_regime import counting, scratch

from benchmarks.regimes.federated import BITS, BOUND, CURVE, NATS, UP, WAYS, Federated
from benchmarks.regimes.runs import RESULT, RUNS, TABLE, carry_out
from mft.config import TrainConfig


def clients(directory, arms=WAYS):
    """Return a regime with two seeds and one rate for each arm."""
    texts = {name: counting(directory, name, step) for step, name in enumerate("abc", start=1)}
    local = TrainConfig(steps=1, batch_size=4, schedule="constant", warmup_ratio=0.0, betas=(0, 0.99))
    shared = {"seeds": [0, 1], "scratch": scratch(directory), "extensions": 0, "workers": 1}
    return Federated({arm: [1e-2] for arm in arms}, **shared, clients=texts, rounds=2, looks=2, local=local)


@pytest.fixture(scope="module")
def carried_out(tmp_path_factory):
    """Return (regime, directory, result)."""
    regime, out = clients(tmp_path_factory.mktemp("texts")), tmp_path_factory.mktemp("out")
    return regime, out, carry_out(regime, out, "test")


@pytest.mark.slow
def test_each_run_has_the_nats_of_each_document(carried_out):
    result = carried_out[2]
    assert {run["arm"] for run in result["runs"]} == set(WAYS)
    for run in result["runs"]:
        assert {client: len(nats) for client, nats in run[NATS].items()} == {
            client: len(tokens) for client, tokens in result["documents"]["tokens"].items()
        }


@pytest.mark.slow
def test_a_finished_regime_runs_nothing_again_and_another_in_its_directory_is_refused(carried_out, capsys):
    regime, directory, result = carried_out
    again = carry_out(regime, directory, "test")
    assert ", seed 0: " not in capsys.readouterr().out
    assert again["arms"] == result["arms"]
    assert json.loads((directory / RESULT).read_text())["arms"] == json.loads(json.dumps(result["arms"]))
    assert "mask votes" in (directory / TABLE).read_text()
    with pytest.raises(ValueError, match="regime.json must be what runs.*--out"):
        carry_out(dataclasses.replace(regime, seeds=[0, 1, 2]), directory, "test")


@pytest.mark.slow
def test_a_run_that_diverges_is_a_note_and_not_the_end(carried_out, tmp_path):
    rates = {BOUND: [1e-2, 1e20], "FedAvg of LoRA": [1e-2, 2e-2]}
    regime = dataclasses.replace(carried_out[0], rates=rates, seeds=[0])
    result = carry_out(regime, tmp_path, "test")
    assert result["arms"][BOUND]["lr"] == 1e-2
    assert [run["lr"] for run in result["runs"] if "diverged" in run] == [1e20]
    assert len(list((tmp_path / RUNS).iterdir())) == 4


@pytest.mark.slow
def test_every_way_but_the_bounds_sends_at_most_a_bit_per_weight(carried_out):
    heads = 8 * 5 * 14 / (2 * (4 * 16 * 16 + 3 * 16 * 32))  # 5 bytes for each of the 14 small matrices
    for arm, found in carried_out[2]["arms"].items():
        if not arm.startswith(BOUND):
            assert 0 < found[f"most {BITS}"] <= (1 if "LoRA" not in arm else 1.5) + heads
    assert carried_out[2]["arms"][BOUND][BITS] == 32
    for run in carried_out[2]["runs"]:
        assert np.array(run[UP]).shape == (2, 3)
        assert [rounds for rounds, _ in run[CURVE]] == [1, 2]


@pytest.mark.slow
@pytest.mark.parametrize("arm", WAYS)
def test_rounds_bring_the_clients_text_nearer(arm, tmp_path):
    """The rate suits a model that was trained for two steps; the first evaluation is after one round."""
    regime = clients(tmp_path, [arm])
    local = dataclasses.replace(regime.local, steps=3)
    longer = dataclasses.replace(regime, rates={arm: [2e-2]}, seeds=[0], rounds=6, local=local)
    curve = carry_out(longer, tmp_path / "out", "test")["arms"][arm][CURVE]
    assert curve[-1][1] < curve[0][1]
