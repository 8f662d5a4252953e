"""Studies over codes: what rounding keeps, arms that begin there, what is refused, and what is recovered."""

import math
import re
import sys

import pytest
import torch
from safetensors.torch import load_file
from tiny_study import equal, make_study, run_quietly

from mft import quantizers
from mft.config import MaskConfig, TrainConfig
from mft.evaluation.kl_divergence import kl_divergence
from mft.masks.quantize import quantize_model
from mft.models.causal_lm import clone_with_own_weights
from mft.models.codes.weight import QuantizedWeight, quantized_weights
from mft.models.linears import weight_name
from mft_study.arms.size import score_bytes
from mft_study.arms.weights import clone_with_weights
from mft_study.bases import Bases
from mft_study.load import load_study
from mft_study.outcome import Unit
from mft_study.report.table import recovered_share, reference_of
from mft_study.store import Store
from mft_study.study_plan import starts_of, teachers_of
from mft_study.workspace import Workspace

FULL = "  base: {kind: base}\n  full: {kind: full, lrs: [1e-2]}\n"
ARMS = (
    FULL
    + """
  NF4: {kind: quantized, quantization: nf4}
  control: {kind: control, lrs: [1e-2]}
  NF4 of control: {kind: quantized, start: control, quantization: nf4}
  NF4 of base: {kind: quantized, start: base, quantization: nf4}
  mask: {kind: mask, start: NF4, lrs: [1e-2], mode: value, threshold: 0}
  QLoRA: {kind: lora, start: NF4, lrs: [1e-2], lora_rank: 2}
  mask in codes: {kind: in_codes, of: mask}
  QLoRA in codes: {kind: in_codes, of: QLoRA}
  mask from base: {kind: mask, start: NF4 of base, lrs: [1e-2]}
  like base: {kind: lora, start: base, teacher: base, lrs: [1e-2], lora_rank: 2}
  like full: {kind: continued, start: base, teacher: full, lrs: [3e-3], epochs: [3]}
"""
)
MORE = """
  on mask: {kind: mask, start: mask, lrs: [1e-2]}
  taught: {kind: mask, start: NF4, teacher: full, lrs: [1e-2]}
"""


class Done:
    """A study that ran with one seed."""

    def __init__(self, directory):
        self.directory = directory
        self.study = make_study(directory, ARMS, ["seeds=[0]"])
        self.findings, self.lines = self.run()
        self.loss = {arm: one[0].evaluation.loss for arm, one in self.findings.test["count"].items()}
        self.outcome = {one.unit.arm: one for one in self.findings.outcomes}
        self.store = Store(self.study, directory / "run")
        self.workspace = Workspace(self.study, Bases(self.study, directory))

    def run(self):
        return run_quietly(self.study, self.directory / "run")

    def unit(self, arm):
        return Unit("count", arm, 0, self.findings.chosen["count"][arm])

    def path(self, arm):
        return self.store.trained_path(self.unit(arm), self.findings.chosen)

    def weights(self, arm):
        return load_file(self.path(arm))

    def declared(self, *overrides):
        """Return the study with further arms, which did not run."""
        return make_study(self.directory, ARMS + MORE, overrides)


@pytest.fixture(scope="module")
def done(ground):
    return Done(ground)


def codes_of(done, weights, kind):
    """Return what the codes of quantize_model hold for the base model with these weights, by parameter name."""
    model = clone_with_weights(done.workspace.base, weights)
    own = clone_with_own_weights(model, {name.rpartition(".")[0] for name in done.weights("NF4")})
    found = quantized_weights(quantize_model(own.requires_grad_(False), kind))
    return {weight_name(model, name): weight.dense() for name, weight in found.items()}


@pytest.mark.slow
def test_a_quantized_arm_holds_to_the_bit_what_the_codes_of_its_start_do(done):
    for arm, start, kind in (("NF4", "full", "nf4"), ("NF4 of control", "control", "nf4")):
        before = done.weights("full") | done.weights(start)
        assert equal(done.weights(arm), codes_of(done, before, kind)), arm
    assert equal(done.weights("NF4 of base"), codes_of(done, {}, "nf4"))
    assert done.loss["NF4"] != done.loss["full"]


def test_a_mask_over_codes_drops_some_and_changes_none(done):
    for arm, start in (("mask", "NF4"), ("mask from base", "NF4 of base")):
        before, after = done.weights(start), done.weights(arm)
        assert all(((after[name] == before[name]) | (after[name] == 0)).all() for name in after)
        assert any((after[name] != before[name]).any() for name in after), arm


def test_adapters_lie_beside_the_codes(done):
    assert all("lora" in name for name in done.weights("QLoRA"))
    assert done.loss["QLoRA"] < done.loss["NF4"]


def test_a_mask_in_codes_is_the_mask_and_its_codes_differ_where_it_drops(done):
    assert equal(done.weights("mask in codes"), done.weights("mask"))
    assert done.loss["mask in codes"] == done.loss["mask"]
    before = done.weights("NF4")
    for name, after in done.weights("mask in codes").items():
        held, dropped = QuantizedWeight.quantize(before[name], "nf4"), (after != before[name]).flatten()
        assert torch.equal(held.dense(), before[name])
        assert dropped.any()
        held.codes, _ = held.coded().dropped(~dropped)
        assert torch.equal(held.dense(), after), name


def test_adapters_in_codes_are_merged_and_rounded_again(done):
    assert done.loss["QLoRA in codes"] != done.loss["QLoRA"]
    before = done.weights("full") | done.weights("NF4")
    weights = done.weights("QLoRA in codes")
    assert equal(weights, {name: codes_of(done, before | weights, "nf4")[name] for name in weights})
    assert any((weights[name] != before[name]).any() for name in weights)


def test_what_lies_in_codes_costs_no_memory_and_the_bytes_of_what_it_is_made_of(done):
    for arm in ("mask", "QLoRA"):
        made, source = done.outcome[f"{arm} in codes"], done.outcome[arm]
        assert (made.bytes, made.resident) == (source.bytes, 0)
        assert source.resident > 0


def test_an_arm_with_a_teacher_learns_its_words_and_not_the_texts(done):
    base, rows = done.workspace.base, done.workspace.splits("count").train
    full, like = (clone_with_weights(base, done.weights(arm)) for arm in ("full", "like full"))
    before, after = (kl_divergence(model, full, rows, batch_size=8)[0].sum() for model in (base, like))
    assert after < 0.3 * before
    # This arm begins at its teacher, so its gradient is only rounding error, of which AdamW still makes steps.
    assert abs(done.loss["like base"] - done.loss["base"]) < 5e-3


def test_what_was_done_is_kept_and_what_was_lost_is_made_again(done):
    assert done.run()[1] == []
    before = done.weights("NF4")
    for arm in ("NF4", "NF4 of control", "mask"):
        done.path(arm).unlink()
    for arm in ("NF4 of control", "mask"):
        for tested in (done.directory / "run" / "test" / "count" / arm).glob("*.json"):
            tested.unlink()
    again = [re.search(r"count, ([\w ]+),", line)[1] for line in done.run()[1]]
    assert sorted(again) == ["NF4", *["NF4 of control"] * 2, *["mask"] * 2]
    assert equal(done.weights("NF4"), before)


def test_a_key_knows_the_codes_and_the_teacher_below_an_arm(done):
    def keys(study):
        chosen = {"count": {arm: config.settings(study.mask)[0] for arm, config in study.arms.items()}}
        store = Store(study, done.directory / "other")
        return {arm: store.key(Unit("count", arm, 0, chosen["count"][arm]), chosen) for arm in study.arms}

    before, over = keys(done.declared()), ["mask", "QLoRA"]
    for change, moved in {
        "arms.NF4.quantization=nf4-dq": ["NF4", *over, *(f"{arm} in codes" for arm in over), "on mask", "taught"],
        "arms.taught.teacher=control": ["taught"],
        "arms.taught.teacher=base": ["taught"],
        "arms.taught.teacher=null": ["taught"],
        "arms.mask from base.start=base": ["mask from base"],
    }.items():
        after = keys(done.declared(change))
        assert [arm for arm in before if before[arm] != after[arm]] == moved, change


def test_starts_and_teachers_are_chains_from_the_base_model(done):
    study = done.declared()
    chosen = {"count": {arm: config.settings(study.mask)[0] for arm, config in study.arms.items()}}
    units = {arm: Unit("count", arm, 0, setting) for arm, setting in chosen["count"].items()}
    starts = {arm: [one.arm for one in starts_of(study, chosen, unit)] for arm, unit in units.items()}
    assert starts["on mask"] == ["full", "NF4", "mask"]
    assert starts["mask from base"] == ["NF4 of base"]
    assert starts["like base"] == starts["NF4 of base"] == []
    assert teachers_of(study, chosen, units["like base"]) == []
    assert teachers_of(study, chosen, units["taught"]) == [units["full"]]
    assert teachers_of(study, chosen, units["mask"]) is None
    assert study.needs("taught") == ["NF4", "full"]
    assert study.needs("like base") == []
    assert study.codes_under("on mask") == "NF4"
    assert study.codes_under("NF4 of control") is None


def test_memory_is_that_of_codes_where_an_arm_begins_over_codes_and_of_what_it_trains(done):
    names, _ = done.workspace.layers_of(done.study.arms["mask"])
    shapes = [done.workspace.base.get_parameter(f"{name}.weight").shape for name in names]
    coded = {name: p for name, p in done.workspace.base.named_parameters() if name in done.weights("NF4")}
    rest = sum(p.numel() for p in done.workspace.base.parameters()) - sum(p.numel() for p in coded.values())
    base = 4 * rest + sum(p.numel() // 2 + 4 * math.ceil(p.numel() / 64) for p in coded.values())
    scores, sides = sum(n * k for n, k in shapes), sum(n + k for n, k in shapes)
    assert done.outcome["mask"].memory == base + 16 * scores
    assert done.outcome["QLoRA"].memory == base + 16 * 2 * sides
    dense = 4 * sum(p.numel() for p in done.workspace.base.parameters())
    assert done.outcome["control"].memory == dense + 12 * scores  # the weights are already counted in the model
    assert done.outcome["full"].memory == 4 * dense
    assert done.outcome["like base"].memory == dense + 16 * 2 * sides
    assert done.outcome["NF4"].memory is None
    assert done.outcome["NF4"].bytes == 2 * rest + base - 4 * rest


def test_a_score_needs_its_gradient_and_two_moments():
    assert score_bytes(MaskConfig(), TrainConfig(steps=1)) == 16
    narrow = score_bytes(MaskConfig(scores_dtype="bfloat16"), TrainConfig(steps=1, moments="8bit"))
    assert narrow == 2 + 2 + 2 + 8 / 256


@pytest.mark.parametrize(
    ("study", "arm", "hidden", "keys", "intermediate"),
    [("quantised-small", "QLoRA 81 on NF4", 128, 128, 352), ("quantised", "QLoRA 347 on NF4", 576, 192, 1536)],
)
def test_a_shipped_study_has_adapters_of_equal_memory(study, arm, hidden, keys, intermediate):
    attention = [(hidden, hidden), (keys, hidden), (keys, hidden), (hidden, hidden)]
    layer = [*attention, (intermediate, hidden), (intermediate, hidden), (hidden, intermediate)]
    scores, sides = sum(n * k for n, k in layer), sum(n + k for n, k in layer)
    assert load_study(study).arms[arm].lora_rank == scores // sides  # as many bytes per number of both


def test_an_arm_over_codes_is_held_against_the_control_of_its_exact_start_rounded_alike(done):
    held = {arm: reference_of(done.declared(), arm) for arm in done.declared().arms}
    assert held["mask"] == held["on mask"] == held["QLoRA"] == "NF4 of control"
    assert held["mask from base"] is None  # no control was trained from its start
    assert held["NF4"] == held["NF4 of control"] == held["full"] == "control"
    assert held["control"] is None
    other = done.declared("arms.NF4 of control.quantization=int8")
    assert reference_of(other, "mask") is None  # it is rounded differently
    alike = done.declared("arms.NF4.quantization=int8", "arms.NF4 of control.quantization=int8")
    assert reference_of(alike, "mask") == "NF4 of control"


def test_what_is_recovered_is_a_share_of_what_rounding_cost(done):
    losses = {"full": 2.0, "NF4": 2.4, "mask": 2.1, "QLoRA": 1.9, "control": 1.0, "NF4 of control": 1.5}
    assert recovered_share(done.study, losses, "mask") == pytest.approx(0.75)
    assert recovered_share(done.study, losses, "QLoRA") == pytest.approx(1.25)
    assert recovered_share(done.study, losses, "control") is None
    assert recovered_share(done.study, losses | {"NF4": 2.0}, "mask") is None
    from_base = {"base": 3.0, "NF4 of base": 3.5, "mask from base": 3.25}
    assert recovered_share(done.study, from_base, "mask from base") == pytest.approx(0.5)


def test_what_rounding_needs_is_asked_for_before_anything_is_trained(done, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setattr(quantizers, "_functional", None)
    with pytest.raises(RuntimeError, match="nf4 needs bitsandbytes"):
        Workspace(done.study, Bases(done.study, done.directory))
