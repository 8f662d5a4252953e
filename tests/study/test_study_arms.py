"""Each kind of arm on the tiny Llama: what it trains, what it leaves alone, what its files hold."""

import copy
import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_study import equal, make_study

from mft.evaluation.evaluate import evaluate
from mft.evaluation.kl_divergence import kl_divergence
from mft.files.mask_coding import coded_size
from mft.masks.convert import masked_modules
from mft_study.arms.setting import Setting
from mft_study.arms.weights import clone_with_weights
from mft_study.bases import Bases
from mft_study.outcome import Unit
from mft_study.units import measure
from mft_study.units.job import Job, model_of
from mft_study.units.unit_run import run_test, run_unit
from mft_study.workspace import Workspace

ARMS = """
  base: {kind: base}
  full: {kind: full, lrs: [1e-2]}
  continued: {kind: continued, lrs: [1e-2]}
  control: {kind: control, lrs: [1e-2]}
  lora: {kind: lora, lrs: [1e-2], lora_rank: 2}
  random: {kind: random}
  magnitude: {kind: magnitude}
  magnitude_rows: {kind: magnitude_rows}
  wanda: {kind: wanda}
  gradient: {kind: gradient}
  fisher: {kind: fisher}
  temperature: {kind: temperature}
  mask: {kind: mask, lrs: [1e-2]}
  mask from wanda: {kind: mask, lrs: [1e-2], init: wanda}
  mask free: {kind: mask, lrs: [1e-2], mode: value, threshold: 0, betas: [0, 0.99]}
  deletion:
    {kind: mask, lrs: [1e-2], mode: value, threshold: 0, init: wanda, target_modules: [gate_proj], sharpness: 50}
  dear deletion:
    {kind: mask, lrs: [1e-2], mode: value, threshold: 0, init: wanda, target_modules: [gate_proj], sharpness: 50,
     deletion_penalty: 0.3}
  mask lower: {kind: mask, lrs: [1e-2], layers_to_transform: 1}
  mean of masks: {kind: average, of: mask, runs: 2}
  mean of adapters: {kind: average, of: lora, runs: 2}
  mask on control: {kind: mask, lrs: [1e-2], start: control}
  kept on magnitude: {kind: kept_weights, lrs: [1e-2], start: magnitude}
  merged on magnitude: {kind: masked_lora, lrs: [1e-2], lora_rank: 2, start: magnitude}
  merged on control: {kind: masked_lora, lrs: [1e-2], lora_rank: 2, start: control}
  lora on magnitude: {kind: lora, lrs: [1e-2], lora_rank: 2, start: magnitude}
  part of full: {kind: interpolated, of: full, alphas: [0, 0.5, 1]}
  part of control: {kind: interpolated, of: control, alphas: [0, 0.5, 1]}
  part of lora: {kind: interpolated, of: lora, alphas: [0, 0.5, 1]}
  part of mask: {kind: interpolated, of: mask, alphas: [0, 0.5, 1]}
  mean of continued: {kind: average, of: continued, runs: 2}
  bitdelta: {kind: bitdelta, of: control}
  bitdelta of continued: {kind: bitdelta, of: continued}
  bitdelta trained: {kind: bitdelta, of: control, lrs: [1e-2]}
  ternary: {kind: ternary, of: control, shares: [0.1]}
  sparse_delta: {kind: sparse_delta, of: control, shares: [0.1]}
general:
  other: {source: DIRECTORY/data.jsonl, sequence_length: 8, max_eval_tokens: 64}
"""
TRAINED, ONE_SHOT = ("continued", "control", "lora", "mask"), ("random", "magnitude", "wanda", "gradient", "fisher")
LAYERS = ("model.layers.2.", "model.layers.3.")


class Ground:
    """A workspace on files, its fine-tune of seed 0, and units of all arms that begin there; each runs once."""

    def __init__(self, directory: Path) -> None:
        self.directory, self._ran = directory, {}
        self.workspace = self.fresh()
        self.full = self.run("full")

    def fresh(self, **options) -> Workspace:
        arms = ARMS.replace("DIRECTORY", str(self.directory))
        study = make_study(self.directory, arms, [f"{key}={value}" for key, value in options.items()])
        return Workspace(study, Bases(study, self.directory))

    def job(self, arm, *, part=0, keep=0.9, lr=1e-2, on_test=False, **more) -> Job:
        study = self.workspace.study
        config, starts, before, parts, source = study.arms[arm], (), study.start_of(arm), (), None
        kind = study.arms[config.of].kind if config.kind == "average" else config.kind
        trained = kind in ("full", *TRAINED) or bool(config.lrs)
        masked = kind in (*ONE_SHOT, "magnitude_rows", "mask")
        setting = Setting(lr if trained else None, 1.0 if trained else None, keep if masked else None, **more)
        if config.kind == "average" and part == 0:
            parts = tuple((job.unit, job.trained) for job in (self.job(config.of), self.job(arm, part=1)))
        while before is not None:
            starts, before = (self.job(before).trained, *starts), study.start_of(before)
        if config.of is not None and config.kind != "average":
            of = self.job(config.of)
            source = of.unit, of.trained
        path = self.directory / f"{arm}, part {part}, {setting}.safetensors"
        return Job(Unit("count", arm, 0, setting, part), starts, path, parts, source, on_test=on_test)

    def run(self, arm, **options):
        """Return the outcome of this unit, which has run once."""
        job = self.job(arm, **options)
        if job.trained not in self._ran:
            self._ran[job.trained] = run_unit(self.workspace, job)
        return self._ran[job.trained]

    def tested(self, arm, **options):
        return run_test(self.workspace, self.job(arm, on_test=True, **options))

    def weights(self, arm, **options):
        return load_file(self.job(arm, **options).trained)


@pytest.fixture(scope="module")
def ground(ground):
    return Ground(ground)


def fine_tune(ground):
    ground.workspace.begin("count", (ground.job("full").trained,), 0)
    return ground.workspace.model


@pytest.mark.parametrize(
    "arm", [*TRAINED, *ONE_SHOT, "base", "magnitude_rows", "temperature", "mask from wanda", "mask lower"]
)
def test_every_kind_runs_and_its_files_give_on_test_what_validation_saw(ground, arm):
    """It changes neither the fine-tune nor the base."""
    before, base = (copy.deepcopy(model.state_dict()) for model in (fine_tune(ground), ground.workspace.base))
    found = run_unit(ground.workspace, ground.job(arm))
    assert equal(dict(fine_tune(ground).state_dict()), dict(before))
    assert equal(dict(ground.workspace.base.state_dict()), dict(base))
    assert not masked_modules(fine_tune(ground))
    tested = ground.tested(arm)
    assert tested.validation.evaluation.loss == pytest.approx(found.loss, abs=1e-5)
    assert tested.test.evaluation.tokens.sum() > 0
    assert tested.test.tempered is not None
    assert tested.test.temperature > 0
    assert found.curve[-1][0] == 1.0


def test_the_fine_tune_begins_at_the_base_and_is_evaluated_at_its_end_alone(ground):
    assert [share for share, _ in ground.full.curve] == [1.0]
    base = ground.run("base")
    assert ground.full.loss < base.loss - 0.3
    assert set(ground.weights("full")) == {name for name, _ in ground.workspace.base.named_parameters()}
    assert not torch.equal(ground.weights("full")["model.norm.weight"], ground.workspace.base.model.norm.weight)


def test_control_and_masks_change_the_chosen_layers_linears_alone(ground):
    state = fine_tune(ground).state_dict()
    for arm in ("control", "mask"):
        ground.run(arm)
        weights = ground.weights(arm)
        names, _ = ground.workspace.layers_of(ground.workspace.study.arms[arm])
        assert set(weights) == {f"{name}.weight" for name in names}
        assert all(name.startswith(LAYERS) for name in weights)
        for name, weight in weights.items():
            changed = weight != state[name]
            if arm == "mask":
                assert (weight[changed] == 0).all()
                assert changed.float().mean() == pytest.approx(0.1, abs=0.01)
            else:
                assert changed.float().mean() > 0.9


def test_flips_count_from_the_initial_mask(ground):
    assert ground.run("mask").flips > 0
    assert ground.run("mask", lr=1e-9).flips == 0
    assert ground.run("control").flips is None


@pytest.mark.slow
def test_evaluating_on_the_way_leaves_training_as_it_was(ground):
    ends = []
    for checkpoints in (1, 3):
        workspace = ground.fresh(checkpoints=checkpoints)
        for arm in TRAINED:
            job = replace(ground.job(arm), trained=ground.directory / "other.safetensors")
            ends.append((arm, run_unit(workspace, job).curve))
    for (arm, once), (_, thrice) in zip(ends[: len(TRAINED)], ends[len(TRAINED) :], strict=True):
        assert len(thrice) == 3, arm
        assert once[-1] == thrice[-1], arm


def test_the_best_checkpoint_is_kept(ground, monkeypatch):
    losses = itertools.chain([2.0, 1.0, 3.0], itertools.repeat(1.0))  # then the losses on other text
    real = evaluate

    def worse_in_the_end(*args, **options):
        result = real(*args, **options)
        result.loss_sums = next(losses) * result.tokens
        return result

    monkeypatch.setattr(measure, "evaluate", worse_in_the_end)
    workspace = ground.fresh(checkpoints=3)
    found = run_unit(workspace, ground.job("control"))
    monkeypatch.undo()
    assert [loss for _, loss in found.curve] == pytest.approx([2.0, 1.0, 3.0])
    assert found.best_share == found.curve[1][0]
    assert found.loss == pytest.approx(1.0)
    kept = ground.weights("control")
    whole = run_unit(ground.workspace, ground.job("control"))
    assert whole.best_share == 1.0
    name = next(iter(kept))
    assert not torch.equal(kept[name], ground.weights("control")[name])


def export_bytes(ground, kept):
    """Return the bytes of these masks, by weight name, in the coding that makes the export smallest."""
    start = fine_tune(ground)
    alone = sum(coded_size(mask) for _, mask in kept)
    return min(alone, sum(coded_size(mask, start.get_parameter(name)) for name, mask in kept))


def test_an_average_is_the_mean_of_the_merged_weights(ground):
    for arm, of in (("mean of masks", "mask"), ("mean of adapters", "lora")):
        ground.run(of)
        ground.run(arm, part=1)
        average = ground.run(arm)
        tested = ground.tested(arm)
        assert tested.validation.evaluation.loss == average.loss
        one = ground.run(of).bytes
        if of == "lora":
            assert average.bytes == 2 * one
        if of == "mask":
            first, second = ground.weights(of), ground.weights(arm, part=1)
            assert not equal(first, second)  # in the order of data
            kept = [(name, (first[name] != 0).int() + (second[name] != 0)) for name in first]
            assert one == export_bytes(ground, [(name, first[name] != 0) for name in first])
            assert average.bytes == export_bytes(ground, [(name, by >= n) for name, by in kept for n in (1, 2)])
            assert one < average.bytes < 2.2 * one
            mean = {name: (first[name] + second[name]) / 2 for name in first}
            validation = ground.workspace.splits("count").validation
            assert average.loss == pytest.approx(evaluate(clone_with_weights(fine_tune(ground), mean), validation).loss)


def test_a_run_that_does_not_stay_finite_is_an_outcome(ground):
    found = ground.run("control", lr=1e30)
    assert found.measured is None
    assert found.loss == float("inf")
    assert "must stay finite" in found.diverged


def test_results_do_not_depend_on_what_ran_before(ground):
    for arm in ("control", "gradient"):
        run_unit(ground.workspace, ground.job(arm))
    after = run_unit(ground.workspace, ground.job("mask", keep=0.8))
    alone = run_unit(ground.fresh(), ground.job("mask", keep=0.8))
    assert equal(after.measured, alone.measured)
    assert after.curve == alone.curve


def test_temperature_scales_the_fine_tunes_logits(ground):
    found = ground.run("temperature")
    tested = ground.tested("full")
    assert found.loss <= ground.full.loss
    assert found.measured.temperature == pytest.approx(tested.test.temperature, rel=1e-3)
    tempered = ground.tested("temperature")
    assert equal(tempered.test.evaluation, tempered.test.tempered)
    assert tempered.test.evaluation.loss == pytest.approx(tested.test.tempered.loss, abs=1e-4)


def test_a_mask_with_a_fixed_threshold_begins_at_the_fine_tune_and_drops_what_it_learns_to(ground):
    still = ground.run("mask free", keep=None, lr=1e-9)
    assert still.flips == 0
    assert still.loss == pytest.approx(ground.full.loss, abs=1e-6)
    moved = ground.run("mask free", keep=None, lr=1e-1)
    assert moved.flips > 0
    dropped = [weight == 0 for weight in ground.weights("mask free", keep=None, lr=1e-1).values()]
    assert sum(int(d.sum()) for d in dropped) / sum(d.numel() for d in dropped) == pytest.approx(moved.flips, abs=1e-6)


@pytest.mark.parametrize("arm", ["mask", "random", "magnitude"])
def test_what_is_kept_is_the_settings_share_not_the_studys(ground, arm):
    job = ground.job(arm, keep=0.6)
    ground.run(arm, keep=0.6)
    ground.workspace.begin("count", job.starts, 0)
    model = model_of(ground.workspace, job)
    names, _ = ground.workspace.layers_of(ground.workspace.study.arms[arm])
    for name in names:
        module = model.get_submodule(name)
        kept = module.mask() if hasattr(module, "mask") else module.weight != 0
        assert kept.float().mean().item() == pytest.approx(0.6, abs=0.02)


@pytest.mark.parametrize("of", ["full", "control", "lora", "mask"])
def test_an_interpolated_arm_lies_between_where_another_began_and_ended(ground, of):
    ended = ground.run(of)
    arm, alphas = f"part of {of}", (0.0, 0.5, 1.0)
    start, _, end = (ground.run(arm, alpha=alpha) for alpha in alphas)
    near, middle, far = (ground.tested(arm, alpha=alpha).general["other"] for alpha in alphas)
    assert start.loss == pytest.approx(ground.run("base").loss if of == "full" else ground.full.loss)
    assert end.loss == pytest.approx(ended.loss, abs=1e-6)
    assert near.mean_kl == 0
    assert min(middle.mean_kl, far.mean_kl) > 0
    if of != "lora":
        ground.workspace.begin("count", ground.job(f"part of {of}").starts, 0)
        model, trained = model_of(ground.workspace, ground.job(f"part of {of}", alpha=0.5)), ground.weights(of)
        for name, weight in trained.items():
            before = ground.workspace.model.get_parameter(name)
            assert torch.allclose(model.get_parameter(name), (before + weight) / 2, rtol=1e-6, atol=1e-8)


def test_an_arm_may_begin_at_another_ones_end(ground):
    ground.run("control")
    ground.run("mask on control")
    control = ground.weights("control")
    for name, weight in ground.weights("mask on control").items():
        assert ((weight == control[name]) | (weight == 0)).all()
        assert (weight == 0).any()


def test_kept_weights_are_trained_where_the_pruned_start_is_not_0(ground):
    ground.run("magnitude")
    found = ground.run("kept on magnitude")
    pruned, trained = ground.weights("magnitude"), ground.weights("kept on magnitude")
    assert trained.keys() == pruned.keys()
    for name, weight in trained.items():
        assert torch.equal(weight == 0, pruned[name] == 0)
        assert (weight != pruned[name]).float().mean() > 0.8
    assert found.bytes == 2 * sum(int(weight.count_nonzero()) for weight in pruned.values())


@pytest.mark.parametrize("arm", ["lora on magnitude", "merged on magnitude"])
def test_an_arm_may_begin_at_a_pruned_model(ground, arm):
    pruned = ground.run("magnitude")
    still = ground.run(arm, lr=1e-9)
    assert still.loss == pytest.approx(pruned.loss, abs=1e-6)
    assert ground.run(arm).loss < still.loss


def test_masked_lora_changes_kept_weights_by_two_factors(ground):
    numbers = 0
    for arm, start in (("merged on magnitude", "magnitude"), ("merged on control", "control")):
        ground.run(start)
        found = ground.run(arm)
        before, after = ground.weights(start), ground.weights(arm)
        assert after.keys() == before.keys()
        for name, weight in after.items():
            assert torch.equal(weight == 0, before[name] == 0)
            change = weight - before[name]
            assert (change[before[name] != 0] != 0).float().mean() > 0.9
            if start == "control":  # without zeros the change is that of LoRA
                numbers += 2 * sum(weight.shape)
                assert torch.linalg.matrix_rank(change, rtol=1e-3) == 2
    assert found.bytes == 2 * numbers
    assert found.resident == 2 * sum(weight.numel() for weight in after.values())


def test_what_is_forgotten_is_measured_on_other_text(ground):
    outcome, tested = ground.full, ground.tested("full")
    other = ground.workspace.general("other")
    assert outcome.general["other"].evaluation.loss == evaluate(fine_tune(ground), other.validation, batch_size=8).loss
    assert tested.general["other"].evaluation.loss == evaluate(fine_tune(ground), other.test, batch_size=8).loss
    outcome = ground.run("control")  # only its layers above those of the start run
    control = clone_with_weights(fine_tune(ground), ground.weights("control")).eval()
    assert outcome.general["other"].evaluation.loss == evaluate(control, other.validation, batch_size=8).loss
    assert outcome.general["other"].kl is None  # measured for chosen runs only
    kl, _ = kl_divergence(control, fine_tune(ground), other.test, batch_size=8)
    assert torch.equal(ground.tested("control").general["other"].kl, kl)
    assert tested.general["other"].mean_kl > 0  # compared with the base, where the fine-tune began
    still = ground.tested("temperature")
    assert still.general["other"].mean_kl == 0


def test_bytes_are_those_of_what_an_arm_adds_to_its_start(ground):
    names, _ = ground.workspace.layers_of(ground.workspace.study.arms["control"])
    shapes = [tuple(ground.workspace.base.get_parameter(f"{name}.weight").shape) for name in names]
    weights = sum(rows * columns for rows, columns in shapes)
    found = {arm: ground.run(arm).bytes for arm in ("base", *TRAINED, "magnitude")}
    assert found["base"] == 0
    assert found["control"] == 2 * weights
    assert found["continued"] == ground.full.bytes == 2 * sum(p.numel() for p in ground.workspace.base.parameters())
    assert found["lora"] == 2 * 2 * sum(map(sum, shapes))  # rank 2
    assert 0.3 * weights / 8 < found["mask"] < 0.7 * weights / 8  # a tenth is dropped: at most 0.47 bits per weight
    assert found["magnitude"] < 0.4 * weights / 8  # the weights themselves tell which are small


def test_a_mask_by_deletion_begins_from_data_with_all_kept_and_a_price_keeps_more(ground):
    still = ground.run("deletion", keep=None, lr=1e-9)
    assert still.flips == 0
    assert still.loss == pytest.approx(ground.full.loss, abs=1e-6)
    free, dear = (ground.run(arm, keep=None) for arm in ("deletion", "dear deletion"))
    assert dear.flips < free.flips
    assert dear.bytes < free.bytes
    assert {name.split(".")[4] for name in ground.weights("deletion", keep=None)} == {"gate_proj"}
    arms = ground.workspace.study.arms
    names, every = (ground.workspace.layers_of(arms[arm])[0] for arm in ("deletion", "mask"))
    assert {name.split(".")[-1] for name in names} == {"gate_proj"}
    assert len(every) > len(names)
