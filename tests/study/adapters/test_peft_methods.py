"""PEFT methods on a model: what an adapter trains and leaves alone, its merge, and the options that are refused."""

import copy
import re
import sys

import pytest
import torch
from method_sweep import PAGE
from tiny import logits, make_gpt2, make_llama, make_rows, masked_llama
from tiny_study import FEW, make_study, run_quietly

from mft.config import TrainConfig
from mft.evaluation.evaluate import evaluate
from mft.models.causal_lm import clone_with_own_weights, first_trainable_layer
from mft.models.frozen_layers import PrefixMemory
from mft.training.loop import train_loop
from mft_study.peft_methods import (
    add_adapter,
    lora_options,
    merge_adapter,
    methods,
)

NAMES = ["model.layers.2.mlp.up_proj", "model.layers.3.self_attn.q_proj"]
TRAIN = TrainConfig(lr=3e-2, steps=20, batch_size=4)


def add_lora(model, seed=0, **options):
    return add_adapter(model, NAMES, lora_options(4) | options, seed)


def trained_lora(model, **options):
    adapted = add_lora(model, **options)
    return adapted, train_loop(adapted.get_base_model(), make_rows(16), TRAIN)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_the_adapters_of_the_named_layers_train_in_fp32(dtype):
    model = add_lora(make_llama(dtype)).get_base_model()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert sorted(trained) == sorted(f"{name}.lora_{part}.default.weight" for name in NAMES for part in "AB")
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert trained[f"{NAMES[0]}.lora_A.default.weight"].shape == (4, 32)
    assert first_trainable_layer(model) == 2
    assert model.get_submodule(NAMES[0]).scaling == {"default": 2.0}


def test_training_lowers_the_loss_and_leaves_the_weights():
    start = make_llama()
    model = clone_with_own_weights(start)
    before = copy.deepcopy(start.state_dict())
    adapted, reports = trained_lora(model)
    assert reports[-1].loss < reports[0].loss - 0.05
    merged, _ = merge_adapter(adapted)
    assert evaluate(merged, make_rows(8, seed=1)).loss < evaluate(start, make_rows(8, seed=1)).loss
    for name, weight in start.state_dict().items():
        assert torch.equal(weight, before[name]), name


def test_the_merged_model_is_the_adapted_one_under_its_old_names():
    around, _ = trained_lora(make_llama())
    adapted, start = logits(around), logits(make_llama())
    model, names = merge_adapter(around)
    assert names == [f"{name}.weight" for name in NAMES]
    assert (adapted - start).abs().max() > 0.01  # otherwise the next line shows nothing
    assert (logits(model) - adapted).abs().max() <= 1e-5
    assert list(model.state_dict()) == list(make_llama().state_dict())
    assert not hasattr(model, "peft_config")
    assert type(model.get_submodule(NAMES[0])) is torch.nn.Linear


def test_merged_16_bit_weights_are_rounded_once():
    adapted, _ = trained_lora(make_llama(torch.bfloat16))
    layer = adapted.get_base_model().get_submodule(NAMES[0])
    product = layer.lora_B["default"].weight.detach() @ layer.lora_A["default"].weight.detach()
    expected = (layer.base_layer.weight.float() + 2 * product).bfloat16()
    assert torch.equal(merge_adapter(adapted)[0].get_submodule(NAMES[0]).weight, expected)


def test_remembering_frozen_layers_changes_no_update():
    runs = []
    for options in ({"remember": False}, {"memory": PrefixMemory()}):
        model = add_lora(make_llama()).get_base_model()
        runs.append([report.loss for report in train_loop(model, make_rows(4), TRAIN, **options)])
    assert runs[0] == runs[1]


def test_adapters_follow_the_seed_and_draw_from_no_other_generator():
    torch.manual_seed(5)
    drawn = torch.rand(1)
    torch.manual_seed(5)
    first = [dict(add_lora(make_llama(), seed).get_base_model().named_parameters()) for seed in (1, 1, 2)]
    assert torch.equal(torch.rand(1), drawn)
    a = f"{NAMES[0]}.lora_A.default.weight"
    assert torch.equal(first[0][a], first[1][a])
    assert not torch.equal(first[0][a], first[2][a])


def test_conv1d_is_adapted_and_merged_too():
    model = make_gpt2()
    around = add_adapter(model, ["transformer.h.1.mlp.c_fc"], lora_options(2))
    with torch.no_grad():
        model.get_submodule("transformer.h.1.mlp.c_fc").lora_B["default"].weight.normal_()
    adapted = logits(model)
    assert (logits(merge_adapter(around)[0]) - adapted).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("model", "names", "message"),
    [
        (make_llama, ["up_proj"], "no linear layer named 'up_proj'"),
        (make_llama, [], "names must hold at least one linear layer"),
        (masked_llama, NAMES, "cannot mask model.layers.2.mlp.up_proj: it is a mft_kernels.layers.linear.MaskedLinear"),
    ],
)
def test_layers_that_are_none_are_told(model, names, message):
    with pytest.raises(ValueError, match=message):
        add_adapter(model(), names, lora_options(4))


def test_the_page_of_methods_has_all_of_the_installed_peft():
    listed = re.findall(r"^\| ([A-Z0-9_]+) \|", PAGE.read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(methods())


def test_a_study_with_lora_and_without_peft_says_so_before_it_trains(ground, tmp_path, monkeypatch):
    study = make_study(ground, FEW + "  LoRA: {kind: lora, lrs: [1e-2]}\n")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(RuntimeError, match="need peft, which is not installed"):
        run_quietly(study, tmp_path / "run")
    assert not list((tmp_path / "run").glob("units/*"))
