"""Seeds that draw more than the order of the data: a base model or documents of their own."""

import json

import pytest
import torch
from tiny_study import make_study, run_quietly

from mft_study.bases import Bases
from mft_study.load import load_study
from mft_study.workspace import Workspace

ARMS = "  base: {kind: base}\n  full: {kind: full, lrs: [1e-2]}\n  MFT: {kind: mask, start: base, lrs: [1e-2]}\n"
STUDY = """
scratch:
  {{vocab_size: 280, hidden_size: 16, intermediate_size: 32, layers: 2, heads: 2,
    data: {{source: {texts}, subset: null, sequence_length: 32}},
    train: {{lr: 1e-2, steps: 3, epochs: null, batch_size: 2}}}}
mask: {{layers_to_transform: 1, init: magnitude, keep_ratio: 0.9}}
domains: {{count: {{source: {texts}, sequence_length: 32, max_train_tokens: 128, max_eval_tokens: 256}}}}
full: {{batch_size: 2}}
stage: {{batch_size: 2}}
seeds: [0, 1]
extensions: 0
checkpoints: 1
workers: 1
arms:
"""


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    directory = tmp_path_factory.mktemp("ground")
    texts = (f"def add_{i}(first, second):\n    return first + second + {i}\n\n" for i in range(200))
    (directory / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (directory / "study.yaml").write_text(STUDY.format(texts=directory / "texts.jsonl") + ARMS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MFT_CACHE", str(directory / "cache"))
        yield directory


def run(ground, directory, *overrides):
    return run_quietly(load_study(ground / "study.yaml", list(overrides)), directory)


def losses(found, arm):
    return {seed: one.evaluation.loss for seed, one in found.test["count"][arm].items()}


def test_each_seed_has_a_base_model_of_its_own_and_the_same_test(ground, tmp_path):
    found, _ = run(ground, tmp_path / "run", "vary=[base]")
    assert sorted(path.name for path in (tmp_path / "run" / "bases").iterdir()) == ["0", "1"]
    base = losses(found, "base")
    assert base[0] != base[1]
    tested = [one.evaluation for one in found.test["count"]["base"].values()]
    assert torch.equal(tested[0].documents, tested[1].documents)
    assert torch.equal(tested[0].tokens, tested[1].tokens)
    for seed in (0, 1):  # after so short a run, a mask stays near the start of its own seed
        assert abs(losses(found, "MFT")[seed] - base[seed]) < abs(base[1] - base[0])
    shared, _ = run(ground, tmp_path / "shared")
    assert losses(shared, "base")[0] == losses(shared, "base")[1] == base[0]  # all seeds share the first seed's base
    _, lines = run(ground, tmp_path / "run", "vary=[base]")
    assert lines == []  # everything is done


def test_a_base_model_that_only_leaders_need_is_trained_when_they_run(ground, tmp_path):
    found, _ = run(ground, tmp_path, "vary=[base]", "leaders.seeds=3")
    assert sorted(path.name for path in (tmp_path / "bases").iterdir()) == ["0", "1", "2"]
    assert sorted(losses(found, "MFT")) == [0, 1, 2]


def test_each_seed_draws_documents_of_its_own_to_train_on(ground, tmp_path):
    study = load_study(ground / "study.yaml", ["vary=[data]"])
    Bases(study, tmp_path).make(0, lambda report: None)
    workspace, rows = Workspace(study, Bases(study, tmp_path)), {}
    for seed in (0, 1, 0):
        workspace.begin("count", (), seed)
        splits = workspace.splits("count")
        rows.setdefault(seed, []).append(splits.train["input_ids"])
        assert splits.test["input_ids"] == workspace.splits("count").test["input_ids"]
    assert rows[0][0] == rows[0][1] != rows[1][0]
    first, second = (workspace.memory("train", 1) for _ in range(2))
    assert first is second
    workspace.begin("count", (), 1)
    assert workspace.memory("train", 1) is not first  # for other rows


def test_a_study_that_varies_is_another_one(ground, tmp_path):
    run(ground, tmp_path / "run", "seeds=[0]")
    with pytest.raises(ValueError, match="vary: not there -> "):
        run(ground, tmp_path / "run", "seeds=[0]", "vary=[data]")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["vary=[bases]"], "vary must be one of base, data, got .*did you mean base"),
        (["vary=[data]", "domains.count.max_train_tokens=null"], "max_train_tokens must say how much of the data each"),
    ],
)
def test_what_cannot_vary_is_refused(overrides, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make_study(tmp_path, overrides=overrides)
