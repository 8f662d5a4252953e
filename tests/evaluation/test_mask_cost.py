"""The defaults begin near the unmasked model. A start far above it is reported at once, with settings that avoid it."""

import copy
import inspect
from pathlib import Path

import pytest
import torch
from tiny import make_llama, make_rows, masked_llama
from tiny_run import LEARN, succeed

from mft.config import MaskConfig, TrainConfig
from mft.evaluation import mask_cost
from mft.evaluation.evaluate import evaluate
from mft.evaluation.mask_cost import mask_cost_warning
from mft.masks.convert import mask_model, masked_modules
from mft.training.loop import finetune, train_masks
from mft.training.run_directory import CHECKPOINTS
from mft.training.saver import Saver
from mft_kernels import MaskedLinear

HELD_OUT = make_rows(16, seed=1)
SAID = "the masks alone cost "


@pytest.fixture(scope="module")
def learned():
    """Return a model that has learned to count: random models lose nothing by a mask."""
    model = make_llama()
    finetune(model, make_rows(48), TrainConfig(lr=1e-2, steps=60, batch_size=16))
    return model


def masked(model, config):
    return mask_model(copy.deepcopy(model), config)


def test_training_with_every_default_makes_the_loss_no_worse(learned):
    model = masked(learned, MaskConfig())
    train_masks(model, make_rows(48), TrainConfig(steps=24, batch_size=4))
    assert evaluate(model, HELD_OUT).loss < evaluate(learned, HELD_OUT).loss + 1e-4
    assert any(not module.mask().all() for module in masked_modules(model).values())


def test_layer_and_configuration_have_the_same_defaults():
    for function in (MaskedLinear, MaskedLinear.from_linear):
        defaults = {name: parameter.default for name, parameter in inspect.signature(function).parameters.items()}
        same = MaskConfig(keep_ratio=defaults["keep_ratio"])
        assert all(defaults[name] == getattr(same, name) for name in ("mode", "init", "threshold"))
    assert inspect.signature(MaskedLinear.reset_scores).parameters["init"].default == MaskConfig().init


def test_what_costs_much_is_told_with_what_would_not(learned):
    config = MaskConfig.paper(keep_ratio=0.3)
    said = mask_cost_warning(masked(learned, config), config, HELD_OUT)
    assert said is not None
    assert said.startswith(SAID)
    assert "(on 4 rows). mask.init=normal mask.keep_ratio=0.3 on 28 layers drops" in said
    assert said.endswith("; mask.keep_ratio=0.99 mask.init=magnitude begins near the model as it is")
    better = MaskConfig(keep_ratio=0.99, init="magnitude")
    assert mask_cost_warning(masked(learned, better), better, HELD_OUT) is None


@pytest.mark.parametrize(
    ("config", "remedy"),
    [
        (MaskConfig.paper(keep_ratio=0.995), "; mask.init=magnitude begins near the model as it is"),
        (MaskConfig(threshold=1.0), "layers drops what the model needs; mask.budget=0.012 mask.threshold=null"),
        (MaskConfig(), "drops what the model needs; mask fewer layers with mask.layers_to"),
    ],
)
def test_only_what_has_to_change_is_named(learned, config, remedy, monkeypatch):
    monkeypatch.setattr(mask_cost, "WELL_ABOVE", -1.0)
    assert remedy in mask_cost_warning(masked(learned, config), config, HELD_OUT)


def test_looking_at_the_cost_changes_no_mask_and_draws_no_number():
    model = masked_llama(keep_ratio=0.7)
    masks = {name: module.mask() for name, module in masked_modules(model).items()}
    state = torch.get_rng_state()
    mask_cost_warning(model, MaskConfig.paper(keep_ratio=0.7), HELD_OUT)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(module.mask(), masks[name]) for name, module in masked_modules(model).items())


@pytest.mark.parametrize("way", ["plain", "layerwise", "quantized"])  # the last is resident, over 4 bits
def test_every_way_of_training_tells_before_it_begins_and_a_resume_does_not(way, cli, tmp_path, monkeypatch):
    monkeypatch.setattr(mask_cost, "WELL_ABOVE", -1.0)
    stopped, after_step = [], Saver.after_step

    def stop(saver, runner, reports, ended):
        after_step(saver, runner, reports, ended)
        if not stopped:
            stopped.append(reports[-1].step)
            raise RuntimeError("stopped here")

    monkeypatch.setattr(Saver, "after_step", stop)
    output = cli.refused("train", *LEARN, f"memory={way}", "checkpoint_minutes=0")
    assert stopped == [1]
    assert output.count(SAID) == 1
    assert list(Path("run", CHECKPOINTS).iterdir())
    output = succeed("train", "--resume", "run")
    assert "goes on after step 1" in output
    assert SAID not in output
