"""Fixtures of publishing: a hub on loopback that this process's client uses, and a finished run."""

import json
import shutil

import pytest
from hub_stub.asked import hub_for
from tiny import masked_llama

from mft.config import RunConfig
from mft.config_file import save_config
from mft.masks.export import save_masks


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with hub_for(tmp_path, monkeypatch) as hub:
        yield hub


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """Return the directory of a finished run of mft train, on the tiny Llama of four layers."""
    directory = tmp_path_factory.mktemp("runs") / "mine"
    directory.mkdir()
    config = RunConfig(output_dir="/secret/runs/mine")
    config.model.dtype = "float32"
    config.mask.layers_to_transform = [2, 3]
    config.data.source = "/secret/my.jsonl"
    save_config(config, directory / "config.yaml")
    numbers = {"before": {"loss": 2.5, "accuracy": 0.25}, "after": {"loss": 2.25, "accuracy": 0.375}}
    numbers |= {"loss after - before": -0.25, "standard error": 0.03125}
    (directory / "table.json").write_text(json.dumps(numbers))
    save_masks(masked_llama(), directory / "masks", base_model_name_or_path="smollm2-135m", coding="packed")
    return directory


@pytest.fixture
def run(finished, tmp_path):
    """Return a copy of the finished run."""
    return shutil.copytree(finished, tmp_path / "runs" / "mine")
