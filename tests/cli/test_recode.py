"""Entropy-coded masks from the command line: trained, read by every verb, and coded again by mft recode."""

import json
import re
import shutil

import pytest
from tiny import equal
from tiny_run import LEARN, merged


@pytest.fixture
def run(cli, tmp_path):
    cli.done("train", *LEARN, "mask.keep_ratio=0.9", "coding=rice")
    return tmp_path / "run"


def test_what_is_trained_with_coding_rice_is_what_every_reader_takes(run, cli, tmp_path):
    assert json.loads((run / "masks" / "adapter_config.json").read_text())["coding"] == "rice"
    output = cli.done("verify", "run")
    size = (run / "masks" / "adapter_model.safetensors").stat().st_size
    assert f"weights kept; rice, {size} bytes, {8 * size / 18432:.3g} bits per weight; content hash" in output
    output = cli.done("recode", "run", "packed", "--coding", "packed")
    again = (tmp_path / "packed" / "adapter_model.safetensors").stat().st_size
    assert f"packed: {again} bytes, {8 * again / 18432:.3g} bits per weight, after {size} bytes; content hash" in output
    for verb in ("inspect", "evaluate"):
        shown = [cli(verb, *(["--masks"] if verb == "evaluate" else []), masks) for masks in ("run/masks", "packed")]
        assert [code for code, _ in shown] == [0, 0], shown
    assert equal(merged(cli, "run"), merged(cli, "packed"))


def test_recoding_in_place_replaces_the_export_and_nothing_else(run, cli):
    before = (run / "masks" / "adapter_model.safetensors").stat().st_size
    assert cli("recode", "run", "run/masks", "--coding", "packed")[0] == 0
    assert (run / "masks" / "adapter_model.safetensors").stat().st_size > before
    assert "directory must be new, empty or an earlier export of masks" in cli.refused("recode", "run", "run")
    shutil.rmtree(run / "masks")
    output = cli.refused("recode", "run", "other")
    assert "run must hold masks, got a run that is not finished" in output.replace("\n", " ")


def test_masks_by_weight_are_read_by_every_verb_that_loads_the_base(run, cli, tmp_path):
    cli.done("recode", "run", "coded", "--coding", "by_weight")
    assert json.loads((tmp_path / "coded" / "adapter_config.json").read_text())["format_version"] == 4
    assert "the masks that it reads have their content hash" in " ".join(cli.done("verify", "coded").split())
    assert "masks are not checked without the base" in " ".join(cli.done("verify", "coded", "--no-base").split())
    shown = [re.findall(r"total of 14 .*? %", cli("inspect", masks)[1]) for masks in ("coded", "run")]
    assert shown[0] == shown[1] != []
    for verb in (("evaluate", "--masks", "coded"), ("generate", "coded", "def"), ("export-masks", "coded", "masks.pt")):
        cli.done(*verb)
    assert equal(merged(cli, "run"), merged(cli, "coded"))
    assert cli("recode", "coded", "back")[0] == 0
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "back" / file).read_bytes() == (run / "masks" / file).read_bytes()
