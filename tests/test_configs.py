"""The shipped configurations of the paper's runs: each loads, and says what the paper's code says."""

from pathlib import Path

import pytest

import mft.config
from mft.config import load_config

CONFIGS = Path(mft.config.__file__).parent / "configs"
LAYERS = {"math": [4, 5, 6, 7], "code": [20, 21, 22, 23], "instructions": [0, 1, 2, 3]}
MODELS = {"llama2_7b": "meta-llama/Llama-2-7b-hf", "llama3.1_8b": "meta-llama/Llama-3.1-8B"}


def test_both_models_have_a_file_for_each_task():
    expected = {f"{model}_{task}.yaml" for model in MODELS for task in LAYERS}
    assert expected == {path.name for path in CONFIGS.glob("*.yaml") if path.name.startswith("llama")}


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_file_loads(path):
    assert load_config(str(path)).output_dir


@pytest.mark.parametrize("task", LAYERS)
@pytest.mark.parametrize("model", MODELS)
def test_values_are_the_papers(model, task):
    config = load_config(str(CONFIGS / f"{model}_{task}.yaml"))
    assert config.model.name == MODELS[model]
    assert (config.mask.layers_to_transform, config.mask.target_modules) == (LAYERS[task], None)
    assert (config.mask.keep_ratio, config.mask.mode, config.mask.init) == (0.9, "magnitude", "normal")
    train = config.train
    assert (train.lr, train.schedule, train.warmup_ratio, train.weight_decay) == (2e-5, "linear", 0.03, 0.0)
    assert train.batch_size * train.accumulation == 128
    assert (config.data.sequence_length, config.data.packing, config.data.assistant_only) == (4096, False, True)
