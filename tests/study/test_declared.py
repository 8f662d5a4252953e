"""The keys of a study's file and its overrides, and the error for each mistake."""

import math
import re

import pytest
from tiny_study import STUDY

from mft.config import DataConfig, MaskConfig
from mft.files.yaml_file import dump_yaml
from mft_study.arms.full import Full
from mft_study.arms.kinds import make_arm
from mft_study.arms.setting import Setting
from mft_study.config import LEAST_RATES, ScratchConfig
from mft_study.load import SHIPPED, load_study, study_values

ARMS = """
  full: {kind: full, lrs: [1e-3, 1e-2]}
  control: {kind: control, lrs: [1e-3]}
  MFT 0.9: {kind: mask, lrs: [1e-3], epochs: [2, 1], keep_ratios: [0.9, 0.8]}
"""


@pytest.fixture
def load(tmp_path):
    def load(*overrides, more="", text=None):
        path = tmp_path / "study.yaml"
        path.write_text(STUDY.format(directory=tmp_path) + ARMS + more if text is None else text)
        return load_study(path, list(overrides))

    return load


@pytest.mark.parametrize("name", sorted(path.stem for path in SHIPPED.glob("*.yaml")))
def test_every_shipped_study_loads_by_its_name(name):
    """Each also tries enough rates for a fair choice."""
    study = load_study(name)
    assert all(len(arm.lrs) == 0 or len(arm.lrs) >= LEAST_RATES for arm in study.arms.values() if arm.follows)
    full = len(study.arms[study.first_of_kind(Full)].lrs)
    assert full >= LEAST_RATES or not full  # some use the model as it comes


def test_a_study_says_what_its_file_says(load):
    study = load()
    assert (study.extensions, study.max_epochs) == (0, 32)
    assert (study.seeds, study.checkpoints, study.stage.batch_size, study.stage.epochs) == ([0, 1], 2, 4, 1.0)
    assert study.mask.layers_to_transform == [2, 3]
    assert isinstance(study.domains["count"], DataConfig)
    assert study.arms["MFT 0.9"].lrs == [1e-3]


def test_the_grid_is_every_combination_in_ascending_order(load):
    grid = load().arms["MFT 0.9"].settings(MaskConfig())
    assert grid == [Setting(1e-3, epochs, keep) for epochs in (1.0, 2.0) for keep in (0.8, 0.9)]
    momentum = make_arm("control", lrs=[1e-3], beta1s=[0.9, 0]).settings(MaskConfig())
    assert momentum == [Setting(1e-3, 1.0, beta1=beta1) for beta1 in (0.0, 0.9)]
    assert make_arm("random").settings(MaskConfig(keep_ratio=0.7)) == [Setting(keep_ratio=0.7)]
    assert make_arm("base").settings(MaskConfig()) == [Setting()]


def test_an_arm_may_have_a_mode_a_threshold_and_betas_of_its_own(load):
    study = load(more="  free: {kind: mask, lrs: [1e-3], mode: value, threshold: 0, betas: [0, 0.99]}\n")
    arm = study.arms["free"]
    assert arm.settings(study.mask) == [Setting(1e-3, 1.0, None)]  # the threshold decides what is kept
    mask = arm.mask_config(study.mask)
    assert (mask.mode, mask.threshold, mask.layers_to_transform) == ("value", 0.0, [2, 3])
    assert study.train_of(arm, Setting(1e-3, 1.0), 0).betas == (0.0, 0.99)
    assert study.train_of(arm, Setting(1e-3, 1.0, beta1=0.5), 0).betas == (0.5, 0.99)
    assert study.train_of(study.arms["control"], Setting(1e-3, 1.0), 0).betas == study.stage.betas


def test_lora_may_have_its_own_weight_decay(load):
    study = load(more="  decayed: {kind: lora, lrs: [1e-3], weight_decay: 0.1}\n  plain: {kind: lora, lrs: [1e-3]}\n")
    decays = {
        name: study.train_of(study.arms[name], Setting(1e-3, 1.0), 0).weight_decay for name in ("decayed", "plain")
    }
    assert decays == {"decayed": 0.1, "plain": study.stage.weight_decay}
    written = study_values(study)["arms"]
    assert written["decayed"]["weight_decay"] == 0.1
    assert "weight_decay" not in written["plain"]  # so older studies stay equal


OTHERS = """
  LoRA: {kind: lora, lrs: [1e-3]}
  NF4: {kind: quantized, quantization: nf4}
  QLoRA: {kind: lora, lrs: [1e-3], start: NF4}
  on NF4: {kind: mask, lrs: [1e-3], start: NF4}
"""


@pytest.mark.parametrize(
    ("arm", "message"),
    [
        ("kind: control, lrs: [1], mode: value", "mode must be left out for this kind, got value"),
        ("kind: random, betas: [0, 0.9]", "betas must be left out for this kind"),
        ("kind: random, quantization: nf4", "quantization must be left out for this kind, got nf4"),
        ("kind: random, teacher: full", "teacher must be left out for this kind, got full"),
        ("kind: control, lrs: [1], lora_ranks: [1]", "lora_ranks must be left out for this kind, got [1]"),
        ("kind: bitdelta, of: control, shares: [0.1]", "shares must be left out for this kind, got [0.1]"),
        ("kind: ternary, of: control, shares: [0.1], lrs: [1]", "lrs must be left out for this kind, got [1.0]"),
        ("kind: average, of: control, max_bytes: 1", "max_bytes must be left out for this kind, because the arm named"),
        ("kind: bitdelta", "of must be given for this kind, got None"),
        ("kind: quantized", "quantization must be given for this kind, got None"),
        ("kind: coded, of: control", "formats must hold at least one of bf16, int8, nf4, int4, got []"),
        ("kind: coded, of: control, formats: [nf5]", "formats must be one of bf16, int8, nf4, int4, got"),
        ("kind: mask, lrs: [1], betas: [0, 1]", "betas must lie in [0, 1), got"),
        ("kind: control, lrs: [1], beta1s: [0, 1]", "beta1s must lie in [0, 1), got [0.0, 1.0]"),
        ("kind: mask, lrs: [1], mode: values", "mode must be one of magnitude, value, got 'values'"),
        ("kind: mask, lrs: [1], threshold: -1", "threshold must be at least 0 unless mode is value, got -1"),
        ("kind: mask, lrs: [1], threshold: 0, keep_ratios: [0.9]", "keep_ratios must be left out with a threshold"),
        ("kind: ternary, of: control, shares: [0]", "shares must lie in (0, 1], got [0.0]"),
        ("kind: lora, lrs: [1], lora_ranks: [0]", "lora_ranks must be at least 1, got [0]"),
        ("kind: lora, lrs: [1], max_bytes: -1", "max_bytes must be at least 0, got -1"),
        ("kind: quantized, quantization: nf5", "quantization must be one of nf4, nf4-dq, int8"),
        ("kind: ternary, of: LoRA, shares: [0.1]", "of must name an arm of the kinds full, continued, control"),
        (
            "kind: bitdelta, of: full, lrs: [1]",
            "of must name an arm of the kinds control, kept_weights: control, got fu",
        ),
        (
            "kind: coded, of: MFT 0.9, formats: [nf4]",
            "of must name an arm of the kinds full, continued, control, kept_weights, lora",
        ),
        ("kind: in_codes, of: LoRA", "of must name an arm that begins at a quantized one, got "),
        ("kind: in_codes, of: control", "of must name an arm of the kinds lora, peft, mask"),
        ("kind: interpolated, of: x, alphas: [1]", "of must name an arm of the kinds"),
        ("kind: mask, lrs: [1], start: y", "start must name an arm of the kinds"),
        ("kind: mask, lrs: [1], start: x", "start must lead back to the full fine-tune, got x"),
        ("kind: continued, start: on NF4, lrs: [1]", "start must lead to no quantized arm for the kind c"),
        (
            "kind: quantized, start: on NF4, quantization: int8",
            "start must lead to no quantized arm, here NF4, whose weights are nf4 already, got on NF4",
        ),
        ("kind: mask, lrs: [1], teacher: QLoRA", "teacher must name an arm of the kinds base, full, cont"),
        ("kind: mask, lrs: [1], teacher: x", "teacher must name an arm that does not need"),
    ],
)
def test_what_an_arm_may_not_say(load, arm, message):
    with pytest.raises(ValueError, match=re.escape(f"arms.x.{message}")):
        load(more=f"{OTHERS}  x: {{{arm}}}\n")


def test_a_threshold_is_an_arms(load):
    with pytest.raises(ValueError, match=r"mask.threshold must be null: an arm has it, got 0.1"):
        load("mask.threshold=0.1")


def test_overrides_reach_every_key(load):
    paths = ["seeds=[5]", "stage.batch_size=8", "arms.MFT 0.9.lrs=[1, 2]", "domains.count.max_train_tokens=65536"]
    study = load(*paths, "scratch.train.batch_size=3", "scratch.layers=2")
    assert (study.seeds, study.stage.batch_size, study.arms["MFT 0.9"].lrs) == ([5], 8, [1.0, 2.0])
    assert study.domains["count"].max_train_tokens == 65536
    # A key that a section does not name keeps its own default, not the default of the section's type.
    scratch = study.scratch
    assert (scratch.layers, scratch.train.batch_size, scratch.train.lr) == (2, 3, ScratchConfig().train.lr)


def test_scratch_can_be_taken_back(load):
    assert load("scratch.layers=2", "scratch=null").scratch is None


def test_what_is_written_loads_equal(load, tmp_path):
    study = load("scratch.layers=2")
    assert load(text=dump_yaml(study_values(study))) == study


def test_shares_are_written_only_if_they_are_given_so_that_older_studies_stay_equal(load):
    assert not re.search("(validation|test)_share: ", dump_yaml(study_values(load("scratch.layers=2"))))
    assert study_values(load("data.test_share=0.2"))["domains"]["count"]["test_share"] == 0.2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stage.batchsize=8", "unknown key 'stage.batchsize'; did you mean stage.batch_size?"),
        ("stage.learning_rate=8", "unknown key 'stage.learning_rate'; did you mean stage.lr?"),
        ("sead=1", "unknown key 'sead'; did you mean seeds?"),
        ("zzzz=1", "unknown key 'zzzz'; known here: arms, domains"),
        ("arms.contrl.lrs=[1]", "unknown name 'contrl'; did you mean control?"),
        ("arms.control.rates=[1]", "unknown key 'arms.control.rates'; known here: arms.control.kind"),
        ("arms.control={kind: base}", "must name one key, such as arms.NAME.KEY; the names are full, control, MFT 0.9"),
        ("data.validation_share=0", "domains.count.validation_share must be above 0 in a study, which chooses by"),
        ("domains.count.test_share=0", "domains.count.test_share must be above 0 in a study, which reports by"),
        ("seeds", "an override must look like stage.batch_size=8, got 'seeds'"),
        ("seeds=[1", "broken YAML"),
        ("seeds=[1, 1]", "seeds must be different ints, got [1, 1]"),
        ("seeds=[]", "seeds must hold at least one int"),
        ("seeds=3", "seeds must be a list of int, got 3 (int)"),
        ("checkpoints=0", "checkpoints must be at least 1"),
        ("checkpoints=two", "checkpoints must be an int, got 'two' (str)"),
        ("stage.lr=1", "stage.lr must be left out: arms decide it"),
        ("full.seed=1", "full.seed must be left out: seeds decide it"),
        ("full.schedule=constant", "full.schedule must fall to 0"),
        ("stage.batch_size=0", "stage.batch_size must be at least 1"),
        ("scratch.train.batch_size=0", "scratch.train.batch_size must be at least 1, got 0"),
        ("arms.control.kind=contrl", "arms.control.kind must be one of base, full"),
        ("arms.control.lrs=[]", "arms.control.lrs must be given for this kind, got []"),
        ("arms.control.lrs=[-1]", "arms.control.lrs must be positive"),
        ("arms.control.lrs=fast", "arms.control.lrs must be a list of float, got 'fast' (str)"),
        ("arms.MFT 0.9.init=wand", "arms.MFT 0.9.init must be one of normal, magnitude, constant, random"),
        ("arms.control.kind=full", "arms must hold exactly one of kind full, got 2"),
        ("answers=[cuont]", "answers must be one of count, got 'cuont'; did you mean count?"),
        ("domains=[a]", "must name one key, such as domains.NAME.KEY; the names are count"),
        ("stage={batch_size: 8}", "must name one key, got the section 'stage': its keys are stage.lr, stage.steps"),
        ("scratch.train={}", "must name one key, got the section 'scratch.train': its keys are scratch.train.lr"),
    ],
)
def test_a_mistake_says_which_key_and_what(load, override, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        load(override)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            "  mean: {kind: average, of: x}\n",
            "of must name an arm of the kinds continued, control, kept_weights, lora, masked_lora, pe",
        ),
        ("  ../x: {kind: base}\n", "arms must have names of letters, digits"),
        ("  x:\n", "arms.x.kind must be given, got none"),
        ("  x: 3\n", "arms.x must be a mapping of keys, got 3 (int)"),
        ("  x: {knid: base}\n", "unknown key 'arms.x.knid'; did you mean arms.x.kind?"),
    ],
)
def test_a_wrong_arm_is_named(load, more, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        load(more=more)


def test_a_file_without_arms_is_refused(load):
    with pytest.raises(ValueError, match=r"study.yaml: arms must hold at least one name, got null"):
        load(text="seeds: [0]\n")


def test_an_unknown_study_names_the_shipped_ones():
    with pytest.raises(ValueError, match=r"a YAML file or one of .*small.*, got smal; did you mean small"):
        load_study("smal")


def test_rates_are_finite():
    for rates in ([math.inf], [1e-3, math.nan]):
        with pytest.raises(ValueError, match=r"lrs must hold finite numbers, got \[.*(inf|nan)\]"):
            make_arm("mask", lrs=rates, epochs=[1.0])
