"""mft train --merge: from data to an ordinary model in one command."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import equal
from tiny_run import LEARN, merged

from mft.publishing.card import model_card
from mft.publishing.content_kinds import read_contents
from mft.publishing.facts import MERGED


def test_the_merged_model_is_that_of_mft_merge(cli, tmp_path):
    output = cli.done("train", *LEARN, "mask.keep_ratio=0.8", "--merge", "merged")
    assert "the others are 0; the model lies in merged" in output
    assert equal(load_file(tmp_path / "merged" / "model.safetensors"), merged(cli, "run"))


def test_by_alpha_dropped_weights_are_scaled_and_the_card_says_so(cli, tmp_path, model_dir):
    cli.done("train", *LEARN, "mask.keep_ratio=0.8")
    assert cli("merge", "run", "whole")[0] == 0
    output = cli.done("merge", "run", "part", "--alpha", "0.75")
    assert "the others are scaled by 0.25; the model lies in part" in output.replace("\n", " ")
    base, whole, part = (load_file(Path(d) / "model.safetensors") for d in (model_dir, tmp_path / "whole", "part"))
    assert any((whole[name] != base[name]).any() for name in base)
    for name in base:
        assert torch.equal(part[name], torch.where(whole[name] == 0, base[name] * 0.25, base[name])), name
    facts = [json.loads((tmp_path / name / MERGED).read_text()) for name in ("whole", "part")]
    assert "alpha" not in facts[0]
    assert facts[0]["results"]["evaluations"].keys() == {"before", "after"}
    assert facts[1] == facts[0] | {"alpha": 0.75, "results": None}  # the run's losses are those of the whole mask
    cards = [model_card(read_contents(tmp_path / name), "user/merged") for name in ("whole", "part")]
    assert "`alpha`" not in cards[0]
    assert "baked in by `alpha` 0.75, so that kept weights are bit-equal and others scaled by 0.25." in cards[1]
    assert "| `alpha` | 0.75 |" in cards[1]
    (tmp_path / "part" / MERGED).write_text(json.dumps(facts[1] | {"alpha": 2}))
    with pytest.raises(ValueError, match=f"{MERGED}: alpha must lie in .0, 1., got 2.0"):
        read_contents(tmp_path / "part")
    assert "error: alpha must lie in (0, 1]" in cli.refused("merge", "run", "more", "--alpha", "0")


def test_one_held_out_document_gives_a_difference_without_a_standard_error(cli, tmp_path):
    (tmp_path / "data.jsonl").write_text("".join(f'{{"text": "{i} 1 2 3"}}\n' for i in range(3)))
    output = cli.done("train", *LEARN, "--merge", "merged")
    assert "nan" not in output
    assert output.count("warning: validation has 4 scored tokens of 1 document, too few") == 1
    assert json.loads((tmp_path / "run" / "table.json").read_text())["standard error"] is None
    assert re.search(
        r"Loss after - before: .0\.\d{4}\. Before", model_card(read_contents(tmp_path / "merged"), "user/x")
    )


def test_its_place_is_looked_at_before_training(cli, tmp_path):
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "mine").touch()
    output = cli.refused("train", *LEARN, "--merge", "merged")
    assert "--merge must be a new or empty directory, got merged" in output
    assert not (tmp_path / "run").exists()


def test_of_several_processes_the_first_merges(cli, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    cli.done("train", *LEARN, "--merge", "merged")
    assert not (tmp_path / "merged").exists()
