"""Clients that learn together: bits on the wire, and rounds that make progress."""

import dataclasses

import numpy as np
import pytest
from small_regime import counting, scratch

from benchmarks.regimes import federated
from benchmarks.regimes.federated import BITS, BOUND, CURVE, LOSS, NATS, RIVAL, UP, WAYS, Federated
from benchmarks.regimes.runs import carry_out
from mft.config import TrainConfig


@pytest.fixture(scope="module")
def regime(tmp_path_factory):
    """Return a regime with every way of learning together, three clients and two rounds."""
    directory = tmp_path_factory.mktemp("texts")
    return Federated(
        rates={arm: [1e-2] for arm in WAYS},
        seeds=[0, 1],
        scratch=scratch(directory),
        extensions=0,
        workers=1,
        clients={name: counting(directory, name, step) for step, name in enumerate("abc", start=1)},
        rounds=2,
        looks=2,
        local=TrainConfig(steps=1, batch_size=4, schedule="constant", warmup_ratio=0.0, betas=(0, 0.99)),
    )


@pytest.fixture(scope="module")
def result(regime, tmp_path_factory):
    return carry_out(regime, tmp_path_factory.mktemp("out"), "test", lambda line: None)


@pytest.mark.slow
def test_every_way_but_the_bounds_sends_at_most_a_bit_per_weight(result):
    heads = 8 * 5 * 14 / (2 * (4 * 16 * 16 + 3 * 16 * 32))  # 5 bytes for each of the 14 small matrices
    for arm, found in result["arms"].items():
        assert found[BITS] > 0
        if arm == BOUND:
            assert found[BITS] == 32
        elif not arm.startswith(BOUND):
            assert found[f"most {BITS}"] <= (1 if "LoRA" not in arm else 1.5) + heads


@pytest.mark.slow
def test_each_run_has_the_bytes_of_each_round_and_client_and_the_nats_of_each_document(result):
    assert len(result["runs"]) == 2 * len(WAYS)
    for run in result["runs"]:
        assert np.array(run[UP]).shape == (2, 3)
        assert [rounds for rounds, _ in run[CURVE]] == [1, 2]
        for client, nats in run[NATS].items():
            assert len(nats) == len(result["documents"]["tokens"][client])


@pytest.mark.slow
def test_arms_are_compared_with_the_bound_and_with_the_rival(result):
    for arm, found in result["arms"].items():
        for other in (BOUND, RIVAL):
            difference = found[f"{LOSS} - {other}"]
            if arm == other:
                assert difference is None
            else:
                assert difference["estimate"] == pytest.approx(found[LOSS] - result["arms"][other][LOSS], abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("arm", WAYS)
def test_rounds_bring_the_clients_text_nearer(regime, arm, tmp_path):
    """The rate suits a model that was trained for two steps; the first evaluation is after one round."""
    longer = dataclasses.replace(
        regime, rates={arm: [2e-2]}, seeds=[0], rounds=6, local=dataclasses.replace(regime.local, steps=3)
    )
    curve = carry_out(longer, tmp_path, "test", lambda line: None)["arms"][arm][CURVE]
    assert curve[-1][1] < curve[0][1]


def test_each_client_has_the_headers_of_one_part_of_torch(tmp_path, monkeypatch):
    files = {"ATen/core/List.h": "list", "ATen/Utils.h": "utils", "c10/core/Scalar.h": "scalar", "torch/types.h": "no"}
    monkeypatch.setattr(federated, "header_files", lambda: files)
    clients = federated.default_clients(tmp_path, 512, 256)
    assert len(clients) == 10
    read = {name: (tmp_path / f"{name}.jsonl").read_text() for name in ("ATen", "ATen-core", "c10-core", "c10")}
    assert read == {
        "ATen": '{"text": "utils"}\n',
        "ATen-core": '{"text": "list"}\n',
        "c10-core": '{"text": "scalar"}\n',
        "c10": "",
    }
