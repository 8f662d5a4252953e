"""A study on disk: what stays valid when it continues, and what is refused."""

import pytest
import torch
from test_study_plan import bowl, outcome, play
from tiny_study import equal, make_study

from mft.evaluation.evaluate import Evaluation
from mft_study import outcome as outcomes
from mft_study.arms.setting import Setting
from mft_study.outcome import Measured, Outcome, Unit, outcome_from, outcome_values
from mft_study.store import Store, open_store
from mft_study.study_plan import chosen_settings

ARMS = """
  base: {kind: base}
  full: {kind: full, lrs: [1e-3, 1e-2, 1e-1]}
  control: {kind: control, lrs: [1e-3, 1e-2]}
  MFT: {kind: mask, lrs: [1e-3, 1e-2]}
  mean: {kind: average, of: MFT, runs: 2}
  LoRA: {kind: lora, lrs: [1e-2], lora_ranks: [1], max_bytes: 100}
"""


def study_of(tmp_path, *overrides, arms=ARMS):
    return make_study(tmp_path, arms, overrides)


def filled(tmp_path, loss=None, **options):
    """Return a study that has run, with its outcomes, in its directory."""
    study = study_of(tmp_path, **options)
    loss = loss or bowl(1e-2)
    done = play(study, loss)
    chosen = chosen_settings(study, done)
    with open_store(study, tmp_path / "run") as store:
        for one in done:
            store.tell_outcome(one, store.path(one.unit, chosen))
            store.trained_path(one.unit, chosen).parent.mkdir(parents=True, exist_ok=True)
            store.trained_path(one.unit, chosen).write_text("weights")
    return study, done, chosen


def units_kept(tmp_path, *overrides, arms=ARMS):
    study = study_of(tmp_path, *overrides, arms=arms)
    return {one.unit for one in Store(study, tmp_path / "run").outcomes()}


def test_an_outcome_is_read_as_it_was_written():
    generator = torch.Generator().manual_seed(0)
    sums = [torch.rand(5, generator=generator, dtype=torch.float64) / 3 for _ in range(3)]
    evaluation = Evaluation(torch.arange(5), *sums)
    measured = Measured(evaluation, evaluation, 1 / 3, torch.arange(5), torch.ones(5, dtype=torch.int64))
    unit = Unit("a", "b", 2**60, Setting(1e-5 / 3, 0.5, None), 2)
    one = Outcome(unit, measured, [(0.1, 1 / 3)], best_share=0.1, steps=3, tokens=7, seconds=1 / 7, flips=0.2)
    assert equal(outcome_from(outcome_values(one)), one)
    assert equal(outcome_from(outcome_values(outcome(one.unit, float("inf")))), outcome(one.unit, float("inf")))


@pytest.mark.parametrize(
    "addition",
    [
        ["seeds=[0,1,2]"],
        ["arms.control.lrs=[1e-3,1e-2,3e-2]"],
        ["arms.MFT.keep_ratios=[0.9,0.95]"],
        ["arms.control.beta1s=[0,0.9]"],
        ["arms.LoRA.lora_ranks=[1,2]"],
        ["extensions=2", "max_epochs=64"],
        ["workers=5"],
        ["output_dir=elsewhere"],
        ["answers=[count]"],
    ],
)
def test_additions_keep_all_that_was_found(tmp_path, addition):
    _, done, _ = filled(tmp_path)
    with open_store(study_of(tmp_path, *addition), tmp_path / "run") as store:
        assert {one.unit for one in store.outcomes()} == {one.unit for one in done}


def test_further_arms_and_domains_keep_all_that_was_found(tmp_path):
    _, done, _ = filled(tmp_path)
    study = study_of(tmp_path, arms=f"{ARMS}  random: {{kind: random}}\n")
    study.domains["more"] = study.domains["count"]
    with open_store(study, tmp_path / "run") as store:
        assert {one.unit for one in store.outcomes()} == {one.unit for one in done}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("stage.batch_size=8", "stage.batch_size: 4 -> 8"),
        ("model.dtype=bfloat16", "model.dtype: float32 -> bfloat16"),
        ("mask.keep_ratio=0.8", "mask.keep_ratio: 0.9 -> 0.8"),
        ("domains.count.seed=1", "domains.count.seed: 0 -> 1"),
        ("checkpoints=3", "checkpoints: 2 -> 3"),
        ("max_epochs=16", "max_epochs: 32.0 -> 16.0"),
        ("seeds=[0]", "seeds: [0, 1] -> [0]"),
        ("seeds=[1,0]", "seeds: [0, 1] -> [1, 0]"),
        ("arms.control.lrs=[1e-3]", "arms.control.lrs: [0.001, 0.01] -> [0.001]"),
        ("arms.MFT.init=normal", "arms.MFT.init: None -> normal"),
        ("arms.mean.runs=3", "arms.mean.runs: 2 -> 3"),
        ("arms.LoRA.max_bytes=99", "arms.LoRA.max_bytes: 100 -> 99"),
        ("scratch.layers=2", "scratch: None -> not there"),
    ],
)
def test_any_other_change_is_shown_and_refused(tmp_path, change, message):
    filled(tmp_path)
    with pytest.raises(ValueError, match="only arms, domains, seeds after the first and grid values") as caught:
        open_store(study_of(tmp_path, change), tmp_path / "run").__enter__()
    assert message in str(caught.value)
    with open_store(study_of(tmp_path), tmp_path / "run"):  # the refusal released the lock
        pass


def test_a_removed_arm_is_refused(tmp_path):
    filled(tmp_path)
    with pytest.raises(ValueError, match="arms.mean.kind: average -> not there"):
        open_store(study_of(tmp_path, arms=ARMS.replace("  mean:", "  #")), tmp_path / "run").__enter__()


@pytest.mark.parametrize(
    ("change", "invalid"),
    [
        ("model.dtype=bfloat16", {"base", "full", "control", "MFT", "mean", "LoRA"}),
        ("full.batch_size=8", {"base", "full", "control", "MFT", "mean", "LoRA"}),
        ("domains.count.max_eval_tokens=480", {"base", "full", "control", "MFT", "mean", "LoRA"}),
        ("stage.batch_size=8", {"control", "MFT", "mean", "LoRA"}),
        ("arms.MFT.init=normal", {"MFT", "mean"}),
        ("arms.mean.runs=3", {"mean"}),
        ("arms.control.lrs=[5e-3]", set()),
        ("arms.LoRA.max_bytes=99", set()),
    ],
)
def test_a_key_holds_what_determines_its_unit_and_nothing_else(tmp_path, change, invalid):
    _, done, _ = filled(tmp_path)
    kept = {unit.arm for unit in units_kept(tmp_path, change)}
    assert kept == {one.unit.arm for one in done} - invalid


def test_a_key_holds_the_general_texts_of_its_domain_alone(tmp_path):
    _, done, _ = filled(tmp_path)
    for text, kept in (("count", len(done)), ("other", 0)):
        assert len(units_kept(tmp_path, arms=f"{ARMS}general:\n  {text}: {{source: headers}}\n")) == kept


def test_another_fine_tune_makes_what_followed_it_invalid(tmp_path):
    study, done, chosen = filled(tmp_path)
    better = outcome(Unit("count", "full", 0, Setting(3e-2, 1.0)), 0.5)
    with open_store(study, tmp_path / "run") as store:
        store.tell_outcome(better, store.path(better.unit, chosen))
        kept = {one.unit.arm for one in store.outcomes()}
    assert kept == {"base", "full"}
    assert len(done) > 4


def test_another_choice_of_an_arm_makes_what_followed_it_invalid(tmp_path):
    arms = f"{ARMS}  on: {{kind: mask, lrs: [1e-2], start: control}}\n"
    arms += "  part: {kind: interpolated, of: MFT, alphas: [0.5]}\n"
    study, _, chosen = filled(tmp_path, arms=arms)
    assert {"on", "part"} <= {unit.arm for unit in units_kept(tmp_path, arms=arms)}
    with open_store(study, tmp_path / "run") as store:
        for arm in ("control", "MFT"):
            unit = Unit("count", arm, 0, Setting(1e-3, 1.0, 0.9 if arm == "MFT" else None))
            store.tell_outcome(outcome(unit, 0.5), store.path(unit, chosen))
        kept = {one.unit.arm for one in store.outcomes()}
    assert not {"on", "part"} & kept
    assert {"base", "full", "control", "MFT"} <= kept


def test_only_trained_weights_that_may_be_needed_stay(tmp_path):
    study, done, chosen = filled(tmp_path)
    store = Store(study, tmp_path / "run")
    store.prune(done, chosen)
    left = {one.unit for one in done if store.trained_path(one.unit, chosen).is_file()}
    assert left == {one.unit for one in done if one.unit.setting == chosen["count"][one.unit.arm]}
    assert len(left) < len(done)


def test_test_is_opened_once_for_the_same_models(tmp_path):
    study, done, chosen = filled(tmp_path)
    store, units = Store(study, tmp_path / "run"), [one.unit for one in done]
    assert store.open_test(units, chosen) == 1
    assert store.open_test(units[::-1], chosen) == 1
    assert store.open_test(units[:-1], chosen) == 2


def test_what_test_found_is_read_as_it_was_written(tmp_path):
    study, done, chosen = filled(tmp_path)
    store, one = Store(study, tmp_path / "run"), done[-1]
    assert store.tested(one.unit, chosen) is None
    tested = outcomes.Tested(one.unit, one.measured, one.measured)
    store.tell_tested(tested, store.test_path(one.unit, chosen))
    assert equal(store.tested(one.unit, chosen), tested)
    answering = Store(study_of(tmp_path, "answers=[count]"), tmp_path / "run")
    assert answering.tested(one.unit, chosen) is None  # the stored result has no answers, which this study asks for


def test_a_directory_of_something_else_is_refused(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="output_dir must be new, empty or a study's, got .* with thesis.tex"):
            open_store(study_of(tmp_path), tmp_path / "run", overwrite=overwrite).__enter__()


def test_overwrite_begins_anew(tmp_path):
    filled(tmp_path)
    with open_store(study_of(tmp_path, "stage.batch_size=8"), tmp_path / "run", overwrite=True) as store:
        assert store.outcomes() == []
        assert not (tmp_path / "run" / "trained").exists()


@pytest.mark.parametrize("content", ["{", "[" * 100_000], ids=["cut off", "nested too deeply"])
def test_a_broken_file_is_named(tmp_path, content):
    filled(tmp_path)
    path = next((tmp_path / "run" / "units").glob("*/*/*.json"))
    path.write_text(content)
    with pytest.raises(ValueError, match=rf"{path.name} must be the JSON that was written.*delete it"):
        units_kept(tmp_path)
