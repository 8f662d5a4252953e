"""A kind of arm is one class and one line of the registry: a kind defined in this file runs from study to report."""

import copy
import dataclasses
import re
from dataclasses import dataclass
from typing import Annotated

import pytest
from tiny_study import FULL, make_study, run_quietly

from mft.checks import at_least
from mft_study.arms.arm import TRAINING, Arm
from mft_study.arms.kinds import KINDS, class_of, make_arm
from mft_study.arms.size import NUMBER, trained_weight_bytes
from mft_study.load import load_study, study_schema, study_values
from mft_study.outcome import Unit
from mft_study.report.dominance import rivals_of
from mft_study.report.table import study_numbers
from mft_study.report.write import write_study_report
from mft_study.store import Store

ARMS = FULL + "  MFT: {kind: mask, lrs: [1e-2]}\n"
NORMS = "  norms: {kind: norms, lrs: [1e-2, 1e-1], last: 2}\n  mean: {kind: average, of: norms, runs: 2}\n"

# By arm of the shipped small study: the key of its first setting on headers with seed 0.
OF_0_2 = {
    "base": "3f5c7363ab42398c7380",
    "full fine-tune": "805cd2ea06deb9349514",
    "control": "46e7ee49ea7efb64080b",
    "LoRA": "cf201b2b170d1c6a0be0",
    "wanda mask": "e3370d525e8ff97fc9ad",
    "MFT": "a501c2ec167394406224",
    "mean of 3 MFT": "88e2a5e72fff9d3fa7d9",
    "interpolated control": "0ab520c1d11832be836b",
}


@dataclass
class Norms(Arm):
    """The norms of the last layers trained."""

    last: Annotated[int, at_least(1)] = 1  # of the 4 layers, so many

    takes = TRAINING | {"start"}
    needs = frozenset({"lrs"})
    learns = "weights"
    may_start = True
    fades = True
    near = True
    colour = "C4"

    def names(self, model):
        layers = [f"layers.{4 - back}." for back in range(1, self.last + 1)]
        return [name for name, _ in model.named_parameters() if "norm" in name and any(each in name for each in layers)]

    def numbers(self, model):
        return sum(model.get_parameter(name).numel() for name in self.names(model))

    def untrained(self, ground):
        model = copy.deepcopy(ground.start)
        for name in self.names(model):
            model.get_parameter(name).requires_grad_(True)
        return model

    def stored_bytes(self, ground, model):
        return NUMBER * self.numbers(model)

    def training_bytes(self, ground, train):
        return trained_weight_bytes(ground.base, self.numbers(ground.base))


@pytest.fixture
def norms(monkeypatch):
    monkeypatch.setitem(KINDS, "norms", Norms)


def test_a_new_kind_trains_is_chosen_weighed_and_reported(norms, ground, tmp_path):
    findings, _ = run_quietly(make_study(ground, ARMS + NORMS, ["seeds=[0]"]), tmp_path / "run")
    write_study_report(findings, tmp_path / "run", {})
    rows = {row["arm"]: row for row in study_numbers(findings)["domains"]["count"]["rows"]}
    assert rows["norms"]["bytes"] == 2 * sum(p.shape[0] for p in parameters(ground, last=2))
    assert rows["norms"]["loss"] != rows["full"]["loss"]
    assert rows["norms"]["start"] == "full"
    assert rows["mean"]["of"] == "norms"
    assert rivals_of(findings.study, "MFT") == ["full", "norms", "mean"]
    assert (tmp_path / "run" / "table.md").is_file()


def parameters(directory, last):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory / "model")
    return [model.get_parameter(name) for name in make_arm("norms", lrs=[1], last=last).names(model)]


def test_a_key_of_its_own_is_checked_as_all_others_are(norms, tmp_path):
    assert make_study(tmp_path, ARMS + NORMS, ["arms.norms.last=1"]).arms["norms"].last == 1
    for override, message in [
        ("arms.norms.last=0", "arms.norms.last must be at least 1, got 0"),
        ("arms.norms.lsat=1", "unknown key 'arms.norms.lsat'; did you mean arms.norms.last?"),
        ("arms.MFT.last=1", "unknown key 'arms.MFT.last'; did you mean arms.MFT."),
        ("arms.norms.alphas=[1]", "arms.norms.alphas must be left out for this kind, got [1.0]"),
    ]:
        with pytest.raises(ValueError, match=re.escape(message)):
            make_study(tmp_path, ARMS + NORMS, [override])
    told = study_schema()["$defs"]["Arm"]
    assert told["properties"]["last"]["description"] == "of the 4 layers, so many"
    assert "norms" in told["properties"]["kind"]["enum"]
    assert told["description"].endswith(" norms: The norms of the last layers trained.")


def test_it_changes_no_key_of_other_arms(norms, tmp_path):
    """Thus a study continues with what it has found when new kinds are added."""
    with_it, without = make_study(tmp_path, ARMS + NORMS), make_study(tmp_path, ARMS)
    assert study_values(with_it)["arms"]["MFT"] == study_values(without)["arms"]["MFT"]
    unit = Unit("count", "full", 0, without.arms["full"].settings(without.mask)[0])
    assert Store(with_it, tmp_path).key(unit, {}) == Store(without, tmp_path).key(unit, {})


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_needs_only_keys_that_it_takes_and_says_what_it_is(kind):
    cls = class_of({"kind": kind})
    assert cls.needs <= cls.takes
    assert cls.takes <= {item.name for item in dataclasses.fields(cls)}
    assert cls.__doc__
    if cls.learns:
        assert "lrs" in cls.needs


def test_keys_are_those_that_0_2_wrote(tmp_path):
    """A store written by 0.2 is still valid. A key is a hash of all values of an arm, including unused ones."""
    study = load_study("small")
    store, first = Store(study, tmp_path), {name: arm.settings(study.mask)[0] for name, arm in study.arms.items()}
    chosen = {"headers": {name: first[study.chooser(name)] for name in study.arms}}
    found = {name: store.key(Unit("headers", name, 0, chosen["headers"][name]), chosen) for name in OF_0_2}
    assert found == OF_0_2
