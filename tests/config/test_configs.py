"""The shipped configurations: each loads by its name, and the paper's depend on no default."""

from dataclasses import replace
from pathlib import Path

import pytest

import mft.config
from mft.config import DataConfig, MaskConfig, ModelConfig, TrainConfig
from mft.config_file import load_config, read_mapping

CONFIGS = Path(mft.config.__file__).parent / "configs"
LAYERS = {"math": [4, 5, 6, 7], "code": [20, 21, 22, 23], "instructions": [0, 1, 2, 3]}
STEPS = {"math": 938, "code": 469, "instructions": 875}


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_file_loads(path):
    assert load_config(str(path)).output_dir


@pytest.mark.parametrize("task", LAYERS)
@pytest.mark.parametrize("model", ["llama2_7b", "llama3.1_8b"])
def test_masks_and_rates_do_not_lean_on_defaults(model, task):
    config = load_config(str(CONFIGS / f"{model}_{task}.yaml"))
    assert config.mask == MaskConfig.paper(layers_to_transform=LAYERS[task], scores_dtype="auto", seed=42)
    assert {"keep_ratio", "mode", "init"} <= read_mapping(CONFIGS / f"{model}_{task}.yaml")["mask"].keys()
    assert config.train == TrainConfig.of_weights(
        lr=2e-5, steps=STEPS[task], accumulation=128, moments="auto", gradient_checkpointing=True, seed=42
    )


def test_the_papers_setting_has_a_name_in_files_and_in_python():
    config = load_config("paper", ["mask.layers_to_transform=4-7"])
    ours = MaskConfig.paper(layers_to_transform=[4, 5, 6, 7])
    assert ours == MaskConfig(layers_to_transform=[4, 5, 6, 7], keep_ratio=0.9, mode="magnitude", init="normal")
    assert config.mask == replace(ours, scores_dtype="auto")
    assert config.train == TrainConfig.of_weights(lr=2e-5, epochs=2.0, accumulation=128, moments="auto")
    assert (config.model, config.data) == (ModelConfig(), DataConfig())
    assert MaskConfig.paper(keep_ratio=0.8).keep_ratio == 0.8


def test_a_shipped_file_goes_by_its_name_unless_a_file_has_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "paper").mkdir()  # of PDF files, for example
    assert load_config("paper").mask.init == "normal"
    (tmp_path / "paper").rmdir()
    (tmp_path / "paper").write_text("mask: {init: constant}\n")
    assert load_config("paper").mask.init == "constant"
    with pytest.raises(
        ValueError, match=r"or one of deletion, demo, llama2_7b_code, .*, paper, got lama2_7b_code; did you mean llama2"
    ):
        load_config("lama2_7b_code")
