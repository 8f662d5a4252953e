"""run_train and run_finetune, as Python users call them with a configuration."""

import copy
import dataclasses
import os
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tiny import equal
from tiny_run import LEARN, events_of, killed_after

import mft
import mft.training.training_run


@pytest.fixture
def config(cli):
    """Return the configuration of the tiny run, in its directory."""
    return mft.load_config("config.yaml", [*LEARN, "checkpoint_minutes=null"])


def masks_of(directory):
    return load_file(directory / "adapter_model.safetensors")


def test_a_run_from_python_is_that_of_the_command_line(cli, config, tmp_path):
    result = mft.run_train(config)
    assert result.resolve() == tmp_path / "run" / "masks"
    cli("train", *LEARN, "checkpoint_minutes=null", "output_dir=other")
    own, other = masks_of(result), masks_of(tmp_path / "other" / "masks")
    assert equal(own, other)
    assert sorted(os.listdir("run")) == sorted(os.listdir("other"))


def test_formats_that_are_chosen_are_those_of_the_run(config, monkeypatch):
    planned = mft.training.training_run._plan_config

    def plan(config, processes):
        mask, train = copy.deepcopy((config.mask, config.train))
        mask.scores_dtype, train.moments = "int16", "8bit"
        return planned(dataclasses.replace(config, memory="resident", mask=mask, train=train), processes)

    monkeypatch.setattr(mft.training.training_run, "_plan_config", plan)
    mft.run_train(config)
    saved = mft.load_config("run/config.yaml")
    assert (saved.mask.scores_dtype, saved.train.moments) == ("int16", "8bit")


def test_a_full_fine_tune_gives_a_model_directory(config):
    model, _ = mft.load_model(mft.ModelConfig(name=str(mft.run_finetune(config)), dtype="float32"))
    assert not mft.masked_modules(model)


@pytest.mark.parametrize("start", [lambda config: config, mft.Begin])
def test_the_configuration_stays_the_callers(config, start):
    config.model.quantization, config.memory = None, "quantized"  # this chooses a quantisation
    before = copy.deepcopy(config)
    mft.run_train(start(config))
    assert config == before


@pytest.mark.parametrize(("run", "result"), [(mft.run_train, "masks"), (mft.run_finetune, "model")])
def test_a_run_without_validation_has_no_table(config, run, result):
    config.data.validation_share = config.data.test_share = 0.0
    run(config)
    assert set(os.listdir("run")) == {"config.yaml", result, "metrics.jsonl", "plot.png"}
    assert all("accuracy" not in event for event in events_of(Path("run")))


def test_an_evaluation_while_training_needs_validation(config):
    config.data.validation_share, config.train.eval_every = 0.0, 2
    with pytest.raises(ValueError, match="data.validation_share must be above 0 for a loss on validation, got 0"):
        mft.run_train(config)
    assert not os.path.exists("run")


def test_a_run_is_not_overwritten_unasked(config):
    first = masks_of(mft.run_train(config))
    with pytest.raises(ValueError, match=r"output_dir run already holds a run .*: name another one, or pass "):
        mft.run_train(config)
    (Path("run") / "model").mkdir()
    again = masks_of(mft.run_train(mft.Begin(config, overwrite=True)))
    assert not Path("run", "model").exists()
    assert equal(again, first)


def test_a_command_that_torchrun_starts_again_goes_on(config, monkeypatch, capsys):
    """Even one with overwrite: it has already overwritten the older run."""
    config.checkpoint_minutes = 0
    straight = masks_of(mft.run_train(dataclasses.replace(config, output_dir="straight")))
    killed_after(mft.run_train, 2, config)
    with pytest.raises(ValueError, match="output_dir run already holds a run"):
        mft.run_train(config)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    other = dataclasses.replace(config, train=dataclasses.replace(config.train, lr=0.5))
    with pytest.raises(ValueError, match=r"the configuration must be that of the run, .*; train.lr was .*, now 0.5"):
        mft.run_train(other)
    capsys.readouterr()
    masks = masks_of(mft.run_train(mft.Begin(config, overwrite=True)))
    assert "goes on after step 1" in capsys.readouterr().out
    assert equal(masks, straight)
