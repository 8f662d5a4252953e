"""mft train --merge: from data to an ordinary model in one command."""

import torch
from safetensors.torch import load_file
from tiny_run import LEARN


def test_the_merged_model_is_that_of_mft_merge(cli, tmp_path):
    code, output = cli("train", *LEARN, "mask.keep_ratio=0.8", "--merge", "merged")
    assert code == 0, output
    assert "the others are 0; the model lies in merged" in output
    assert cli("merge", "run", "again")[0] == 0
    own, again = (load_file(tmp_path / name / "model.safetensors") for name in ("merged", "again"))
    assert own.keys() == again.keys()
    assert all(torch.equal(own[name], again[name]) for name in again)


def test_its_place_is_looked_at_before_training(cli, tmp_path):
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "mine").touch()
    code, output = cli("train", *LEARN, "--merge", "merged")
    assert (code, "--merge must be a new or empty directory, got merged" in output) == (2, True)
    assert not (tmp_path / "run").exists()


def test_of_several_processes_the_first_merges(cli, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    code, output = cli("train", *LEARN, "--merge", "merged")
    assert code == 0, output
    assert not (tmp_path / "merged").exists()
