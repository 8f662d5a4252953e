"""mft verify, and the verbs that import the paper's masks and export ours."""

import json
import shutil

import pytest
from tiny import masked_llama
from tiny_run import LEARN

from mft.cli.verify import verify_directory
from mft.masks.export import save_masks
from mft.training.checkpoint import write_checkpoint


@pytest.fixture
def run(cli, tmp_path):
    cli.done("train", *LEARN, "mask.keep_ratio=0.9")
    return tmp_path / "run"


def test_masks_checkpoints_and_base_verify(run, cli, model_dir):
    write_checkpoint(run / "checkpoints", 7, {}, {})
    output = cli.done("verify", "run", "--dtype", "float32")
    assert "masks run/masks: 14 masked layers, 90" in output
    assert "content hash agrees" in output
    assert "base: sha256:" in output
    assert "checkpoint run/checkpoints/step-00000007: after step 7; sizes and hashes agree" in output
    assert cli("verify", "run/masks", "--no-base")[0] == 0
    assert cli("verify", "run/checkpoints/step-00000007")[0] == 0


def test_an_export_without_a_content_hash_is_told_from_one_that_was_verified(tmp_path):
    save_masks(masked_llama(), tmp_path, coding="packed")
    assert "content hash agrees" in verify_directory(tmp_path)[0].words
    path = tmp_path / "adapter_config.json"
    values = json.loads(path.read_text())
    del values["content_hash"]
    path.write_text(json.dumps(values | {"format_version": 1}))
    words = verify_directory(tmp_path)[0].words
    assert "no content_hash, as in format_version 1: swapped masks cannot be detected; save_masks writes one" in words


def test_damage_and_another_base_are_told(run, cli, model_dir, tmp_path):
    output = cli.refused("verify", "run", "--dtype", "bfloat16")
    assert "expected a base with sha256:" in output
    path = run / "masks" / "adapter_config.json"
    values = json.loads(path.read_text())
    values["keep_ratio"] = 0.5
    path.write_text(json.dumps(values))
    output = cli.refused("verify", "run", "--no-base")
    assert "adapter_config.json: expected content_hash sha256:" in output
    assert "damaged, or changed by hand" in output
    shutil.rmtree(run / "masks")
    output = cli.refused("verify", "run")
    assert (
        "run: expected adapter_config.json or manifest.json, here, in masks/ or in checkpoints/, got neither" in output
    )


def test_masks_go_to_the_papers_form_and_come_back(run, cli, model_dir, tmp_path):
    output = cli.done("export-masks", "run", "masks.pt", "--dtype", "float32")
    assert "14 masks of run/masks in the form of the paper's code: masks.pt" in output
    output = cli.refused("export-masks", "run", "masks.pt", "--dtype", "float32")
    assert "output must be a new file, got masks.pt" in output
    cli.done("import-masks", "masks.pt", "again", "--model", str(model_dir), "--dtype", "float32")
    before, after = (tmp_path / d / "adapter_model.safetensors" for d in ("run/masks", "again"))
    assert before.read_bytes() == after.read_bytes()
    assert cli("verify", "again", "--dtype", "float32")[0] == 0
