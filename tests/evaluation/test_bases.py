"""Exact and quantised bases from the command line: which one is used, and that the output names it."""

import json
import re
from pathlib import Path

import pytest
from tiny import make_rows, masked_llama

from mft.evaluation.evaluate import evaluate
from mft.masks.convert import keep_all_weights, masked_modules
from mft.masks.export_format import read_export
from mft.masks.quantize import quantize_model

LEARN = ["train.lr=1e-2", "train.epochs=null", "train.steps=2", "mask.layers_to_transform=2-3"]
NF4 = "nf4 weights, those of masked layers exact"


@pytest.fixture
def trained(cli):
    """Return cli, after a run on a base in NF4."""
    cli.done("train", *LEARN, "model.quantization=nf4")
    return cli


def losses(output):
    """Return (without masks, with masks), as the table shows them."""
    return re.findall(r"^ \S.*? +(\d\.\d{4}) ", output, re.MULTILINE)


def test_masks_are_evaluated_on_the_base_on_which_they_were_learned(trained):
    assert read_export(Path("run/masks")).base_quantization == "nf4"
    for same in ([], ["model.quantization=nf4"]):
        output = trained.done("evaluate", "--masks", "run", *same)
        assert f"base: {NF4}, as the masks were learned" in output
        seen = json.loads(Path("run/table.json").read_text())
        assert losses(output) == [f"{seen[name]['loss']:.4f}" for name in ("before", "after")]


def test_one_flag_evaluates_on_the_exact_base(trained):
    quantised = trained("evaluate", "--masks", "run")[1]
    for asked in ([], ["model.quantization=nf4"]):
        output = trained.done("evaluate", "--masks", "run", "--unquantized", *asked)
        assert f"base: exact weights; the masks were learned on {NF4}" in output
        assert len(losses(output)) == len(losses(quantised)) == 2
        assert not set(losses(output)) & set(losses(quantised))


def test_another_base_than_the_masks_is_refused(trained):
    output = trained.refused("evaluate", "--masks", "run", "model.quantization=int8")
    assert f"must be that of the base on which the masks were learned, {NF4}, got int8 weights, those of" in output
    assert "leave it out, or pass --unquantized" in output


def test_several_masks_are_evaluated_in_turn_on_one_base(cli):
    for run, rate in (("run", 1e-2), ("other", 3e-2)):
        output = cli.done("train", *LEARN, f"train.lr={rate}", f"output_dir={run}")
    alone = [losses(cli("evaluate", "--masks", run)[1]) for run in ("run", "other")]
    output = cli.done("evaluate", "--masks", "run", "--masks", "other")
    assert losses(output) == [*alone[0], alone[1][1]]
    assert len(set(losses(output))) == 3


def test_several_masks_on_a_quantised_base_are_refused(trained):
    assert trained("train", *LEARN, "output_dir=exact")[0] == 0
    output = trained.refused("evaluate", "--masks", "exact", "--masks", "run")
    assert "--masks must be learned on exact weights if several are given, got 2 masks, some" in output
    assert trained("evaluate", "--masks", "exact", "--masks", "run", "--unquantized")[0] == 0


def test_merging_uses_the_exact_weights_and_says_so(trained):
    output = trained.done("merge", "run", "merged", "--dtype", "float32")
    assert "the masks were learned on a base in nf4; the merged weights are the exact ones" in output


def test_a_model_alone_can_be_evaluated_quantised(cli):
    output = cli.done("evaluate", "model.quantization=int8", "model.quantize_masked=true")
    assert output.rstrip().endswith("base: int8 weights")
    output = cli.done("evaluate")
    assert output.rstrip().endswith("base: exact weights")


@pytest.mark.parametrize("verb", ["finetune", "compare"])
def test_verbs_that_train_weights_refuse_a_quantised_base(cli, verb):
    output = cli.refused(verb, "model.quantization=nf4")
    assert f"model.quantization must be null for mft {verb}, which trains weights, got nf4" in output
    assert not Path("run").exists()


@pytest.mark.parametrize("mask", [{}, {"mode": "value"}, {"threshold": 0.01}])
def test_keeping_all_is_the_model_without_masks_and_ends(mask):
    rows = make_rows()
    model, expected = (masked_llama(**mask), masked_llama(keep_ratio=1.0))
    for each in (model, expected):
        quantize_model(each, masked=True)
    before = evaluate(model, rows).loss
    with keep_all_weights(model):
        assert evaluate(model, rows).loss == evaluate(expected, rows).loss != before
    assert evaluate(model, rows).loss == before
    assert {module.threshold for module in masked_modules(model).values()} == {mask.get("threshold")}
