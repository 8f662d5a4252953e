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
    full = len(study.arms[study.named(Full)].lrs)
    assert full >= LEAST_RATES or not full  # some use the model as it comes


@pytest.mark.parametrize("name", ["small", "smollm2"])
def test_trained_arms_may_choose_momentum_and_epochs_alike(name):
    study = load_study(name)
    trained = [arm for label, arm in study.arms.items() if arm.lrs and label != "MFT (paper)"]  # with its optimiser
    assert all(arm.betas is None and len(arm.epochs) > 1 for arm in trained)
    decided = {"small": (0, 0.9), "smollm2": ()}[name]  # with momentum, SmolLM2's fine-tune was worse, as its file says
    assert {tuple(arm.beta1s) for arm in trained if not arm.follows} == {decided}
    assert {tuple(arm.beta1s) for arm in trained if arm.follows} == {(0, 0.9)}


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
    mask = study.mask_of(arm)
    assert (mask.mode, mask.threshold, mask.layers_to_transform) == ("value", 0.0, [2, 3])
    assert study.train_of(arm, Setting(1e-3, 1.0), 0).betas == (0.0, 0.99)
    assert study.train_of(arm, Setting(1e-3, 1.0, beta1=0.5), 0).betas == (0.5, 0.99)
    assert study.train_of(study.arms["control"], Setting(1e-3, 1.0), 0).betas == study.stage.betas


@pytest.mark.parametrize(
    ("arm", "message"),
    [
        ("{kind: control, lrs: [1], mode: value}", "mode must be left out for this kind, got value"),
        ("{kind: random, threshold: 0.1}", "threshold must be left out for this kind, got 0.1"),
        ("{kind: random, betas: [0, 0.9]}", "betas must be left out for this kind"),
        ("{kind: mask, lrs: [1], betas: [0, 1]}", "betas must lie in [0, 1), got"),
        ("{kind: random, beta1s: [0]}", "beta1s must be left out for this kind"),
        ("{kind: control, lrs: [1], beta1s: [0, 1]}", "beta1s must lie in [0, 1), got [0.0, 1.0]"),
        ("{kind: mask, lrs: [1], mode: values}", "mode must be one of magnitude, value, got 'values'"),
        ("{kind: mask, lrs: [1], threshold: -1}", "threshold must be at least 0 unless mode is value, got -1"),
        ("{kind: mask, lrs: [1], threshold: 0, keep_ratios: [0.9]}", "keep_ratios must be left out with a threshold"),
    ],
)
def test_what_an_arm_may_not_say(load, arm, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        load(more=f"  wrong: {arm}\n")


def test_a_threshold_is_an_arms(load):
    with pytest.raises(ValueError, match=r"mask.threshold must be null: an arm has it, got 0.1"):
        load("mask.threshold=0.1")


def test_overrides_reach_every_key(load):
    study = load(
        "seeds=[5]",
        "stage.batch_size=8",
        "arms.MFT 0.9.lrs=[1, 2]",
        "domains.count.max_train_tokens=65536",
        "scratch.train.batch_size=3",
        "scratch.layers=2",
    )
    assert (study.seeds, study.stage.batch_size, study.arms["MFT 0.9"].lrs) == ([5], 8, [1.0, 2.0])
    assert study.domains["count"].max_train_tokens == 65536
    # A key that a section does not name keeps its own default, not the default of the section's type.
    assert (study.scratch.layers, study.scratch.train.batch_size, study.scratch.train.lr) == (
        2,
        3,
        ScratchConfig().train.lr,
    )


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
        (
            "data.validation_share=0",
            "domains.count.validation_share must be above 0 in a study, which chooses by validation rows, got 0.0",
        ),
        (
            "domains.count.test_share=0",
            "domains.count.test_share must be above 0 in a study, which reports by test rows, got 0.0",
        ),
        ("seeds", "an override must look like stage.batch_size=8, got 'seeds'"),
        ("seeds=[1", "broken YAML"),
        ("seeds=[1, 1]", "seeds must be different ints, got [1, 1]"),
        ("seeds=[]", "seeds must hold at least one int"),
        ("seeds=3", "seeds must be a list of int, got 3 (int)"),
        ("checkpoints=0", "checkpoints must be at least 1"),
        ("extensions=-1", "extensions must be at least 0, got -1"),
        ("max_epochs=0", "max_epochs must be positive, got 0.0"),
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
            "  mean: {kind: average, of: contrl}\n",
            "arms.mean.of must name an arm of the kinds continued, control, lora, peft, mask: control, MFT 0.9",
        ),
        (
            "  mean: {kind: average}\n",
            "arms.mean.of must be given for this kind, got None",
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
    with pytest.raises(
        ValueError, match=r"config must be a YAML file or one of .*small.*, got smal; did you mean small"
    ):
        load_study("smal")


def test_rates_are_finite():
    for rates in ([math.inf], [1e-3, math.nan]):
        with pytest.raises(ValueError, match=r"lrs must hold finite numbers, got \[.*(inf|nan)\]"):
            make_arm("mask", lrs=rates, epochs=[1.0])
